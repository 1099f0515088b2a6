"""Names that tasks give to people, places and things; no two splits share one.

Some thirty of a kind would do for asking. Whoever learns from them learns to tell thirty names
apart, and takes every other one for one of these; so training has many, and some that are made up.
"""

from __future__ import annotations

import random

from cometlm.tasks.base import Split

# fmt: off
PEOPLE: dict[Split, tuple[str, ...]] = {
    "train": (
        "Ada", "Basil", "Clara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Imani", "Jonas",
        "Keiko", "Luca", "Mira", "Nadia", "Omar", "Priya", "Quinn", "Rosa", "Stefan", "Tomas",
        "Uma", "Viktor", "Wanda", "Xenia", "Yusuf", "Zoe", "Aaron", "Abigail", "Adrian", "Agatha",
        "Aisha", "Alan", "Albert", "Alexei", "Alice", "Amina", "Amos", "Anders", "Andrea", "Angus",
        "Anita", "Anton", "Arthur", "Astrid", "Audrey", "Aurora", "Beatrix", "Benedict", "Bianca",
        "Boris", "Brigid", "Bridget", "Calvin", "Camila", "Carlos", "Cecil", "Cedric", "Celia",
        "Charlotte", "Chen", "Claude", "Clement", "Conrad", "Cora", "Cyrus", "Damian", "Daphne",
        "Deborah", "Denis", "Diana", "Diego", "Dora", "Dorothy", "Edith", "Edmund", "Edgar",
        "Eleanor", "Elias", "Elinor", "Eliza", "Ellen", "Elsa", "Emil", "Emily", "Enzo", "Erik",
        "Ernest", "Esther", "Eugene", "Evelyn", "Ewa", "Felix", "Fiona", "Flora", "Florian",
        "Frances", "Frank", "Frida", "Gabriel", "Gemma", "George", "Gerald", "Gilbert", "Gisela",
        "Gordon", "Grace", "Gwen", "Harold", "Harriet", "Hassan", "Hector", "Heidi", "Helen",
        "Henry", "Herbert", "Hilda", "Horace", "Ida", "Ilse", "Ines", "Ingrid", "Irene", "Isaac",
        "Isabel", "Ivan", "Jack", "Jamal", "James", "Janet", "Jasper", "Javier", "Jean", "Jerome",
        "Joel", "Johan", "Josef", "Judith", "Julia", "Julius", "Karim", "Karl", "Kasper", "Katya",
        "Kenji", "Klara", "Kurt", "Lars", "Laura", "Leon", "Leonie", "Lena", "Lewis", "Lila",
        "Linda", "Lionel", "Louis", "Lucia", "Ludwig", "Lydia", "Mabel", "Malik", "Marco",
        "Margaret", "Maria", "Marta", "Martin", "Matilda", "Maurice", "Max", "Maya", "Mehmet",
        "Milan", "Milo", "Miriam", "Mona", "Morris", "Nathan", "Nell", "Niels", "Nina", "Noah",
        "Nora", "Norman", "Olaf", "Olga", "Oliver", "Olivia", "Otto", "Pablo", "Pascal", "Patrick",
        "Pavel", "Pearl", "Pedro", "Percy", "Petra", "Philip", "Phoebe", "Pierre", "Raymond",
        "Rebecca", "Reza", "Richard", "Rita", "Robert", "Roland", "Roman", "Rosalind", "Ruben",
        "Rufus", "Ruth", "Sabine", "Sadie", "Salma", "Samuel", "Sandra", "Sara", "Saul", "Selma",
        "Sergei", "Sidney", "Sigrid", "Silas", "Simon", "Solomon", "Sonia", "Sophia", "Stella",
        "Susan", "Sven", "Sylvia", "Tamar", "Tariq", "Tessa", "Thelma", "Thora", "Tilda", "Tobias",
        "Ulf", "Ursula", "Valentin", "Vincent", "Viola", "Virginia", "Walter", "Wilfred", "Willa",
        "Winifred", "Yara", "Yann", "Yolanda", "Yuri", "Zachary", "Zelda", "Zofia",
    ),
    "test": (
        "Alma", "Bruno", "Chiara", "Dagny", "Emeka", "Fatima", "Gustav", "Hana", "Igor", "Joanna",
        "Kofi", "Leila", "Magnus", "Noor", "Oskar", "Paula", "Rafael", "Sunita", "Theo", "Vera",
    ),
}
FAMILIES: dict[Split, tuple[str, ...]] = {
    "train": (
        "Aldous", "Brandt", "Castell", "Dimou", "Eriksen", "Fontaine", "Grigor", "Hallam", "Iqbal",
        "Jansen", "Kowal", "Lindqvist", "Moreau", "Nakata", "Okafor", "Petrov", "Quist", "Rossi",
        "Sandoval", "Tanaka", "Ulrich", "Varga", "Weiss", "Yilmaz", "Abbott", "Adler", "Ahmed",
        "Albrecht", "Almeida", "Amsel", "Andrade", "Appel", "Archer", "Arnaud", "Ashby", "Atwood",
        "Bach", "Baker", "Baptiste", "Barlow", "Baumann", "Becker", "Bellamy", "Benitez", "Berger",
        "Bianchi", "Blake", "Bloom", "Boyle", "Bradley", "Brennan", "Briggs", "Brooks", "Burke",
        "Calder", "Campbell", "Cardoso", "Carver", "Castillo", "Chandra", "Chapman", "Clarke",
        "Collins", "Cooper", "Costa", "Crane", "Cruz", "Dalton", "Danvers", "Davies", "Delgado",
        "Demir", "Diaz", "Dixon", "Donovan", "Drake", "Dubois", "Duffy", "Dumont", "Duval",
        "Eklund", "Ellis", "Engel", "Espinoza", "Evans", "Farrow", "Ferreira", "Fischer",
        "Fletcher", "Flores", "Forster", "Foster", "Fox", "Franco", "Frost", "Fuchs", "Gallagher",
        "Garnier", "Garrett", "Gibson", "Gomez", "Graham", "Greene", "Griffin", "Gupta", "Hagen",
        "Hale", "Hansen", "Harper", "Hartmann", "Hayes", "Herrera", "Hobbs", "Hoffmann", "Holm",
        "Horvat", "Hughes", "Hussein", "Ito", "Jacobs", "Jensen", "Jimenez", "Johansson",
        "Kaminski", "Kang", "Kaplan", "Kaufmann", "Kelly", "Khan", "Kimura", "Klein", "Koch",
        "Kovacs", "Kramer", "Kumar", "Lambert", "Lange", "Lehmann", "Leclerc", "Lim", "Lopez",
        "Lund", "Mackenzie", "Maier", "Malone", "Marchetti", "Marsh", "Martinez", "Mason", "Mendes",
        "Meyer", "Miller", "Mitchell", "Molina", "Monroe", "Morgan", "Moretti", "Muller", "Murphy",
        "Nagy", "Nair", "Navarro", "Nielsen", "Nolan", "Nunez", "Oakley", "Obrecht", "Olsen",
        "Osborne", "Owens", "Palmer", "Park", "Patel", "Pearson", "Pereira", "Perez", "Popov",
        "Porter", "Prescott", "Quigley", "Ramos", "Reyes", "Richter", "Ritter", "Rivera",
        "Robinson", "Rojas", "Romero", "Roth", "Rousseau", "Russo", "Ryan", "Salazar", "Santos",
        "Schmidt", "Schneider", "Schubert", "Shah", "Sharma", "Sheridan", "Silva", "Singh", "Soto",
        "Sousa", "Spencer", "Stein", "Stone", "Suarez", "Sullivan", "Suzuki", "Swan", "Takeda",
        "Taylor", "Thorne", "Torres", "Turner", "Underwood", "Valdez", "Vance", "Vasquez", "Vogel",
        "Wagner", "Walsh", "Ward", "Watanabe", "Weber", "Whitaker", "Winter", "Wright", "Yamada",
        "Young", "Zapata", "Zimmermann",
    ),
    "test": (
        "Abara", "Bergman", "Conti", "Dahl", "Egger", "Falk", "Gruber", "Haddad", "Ivanov",
        "Jovic", "Keller", "Larsen", "Mbeki", "Novak", "Ortega", "Pires", "Rahman", "Sato",
        "Toth", "Urban", "Vidal", "Wolff", "Zeller",
    ),
}
TOWNS: dict[Split, tuple[str, ...]] = {
    "train": (
        "Antwerp", "Bergen", "Cadiz", "Dresden", "Esbjerg", "Florence", "Ghent", "Halifax", "Izmir",
        "Jena", "Krakow", "Lisbon", "Malmo", "Nantes", "Odessa", "Porto", "Quebec", "Riga",
        "Seville", "Tartu", "Utrecht", "Vienna", "Wismar", "Zagreb", "Aarhus", "Basle", "Cork",
        "Delft", "Essen", "Graz", "Hobart", "Kiel", "Lyon", "Modena", "Nagoya", "Oulu", "Pisa",
        "Rouen", "Sofia", "Turin", "Albany", "Amiens", "Ankara", "Annecy", "Arnhem", "Athens",
        "Auckland", "Augsburg", "Baku", "Barcelona", "Basra", "Bath", "Beirut", "Belfast",
        "Bergamo", "Berlin", "Bern", "Bogota", "Bologna", "Bonn", "Boston", "Braga", "Bremen",
        "Brno", "Bruges", "Brussels", "Bucharest", "Budapest", "Burgos", "Cairo", "Calais",
        "Calgary", "Cambridge", "Canterbury", "Caracas", "Chester", "Coimbra", "Cordoba", "Corfu",
        "Cracow", "Damascus", "Danzig", "Denver", "Derby", "Dijon", "Dover", "Dundee", "Durham",
        "Eindhoven", "Erfurt", "Evora", "Fez", "Galway", "Gdansk", "Genoa", "Girona", "Glasgow",
        "Gothenburg", "Grenoble", "Groningen", "Haarlem", "Hanover", "Havana", "Heidelberg",
        "Inverness", "Istanbul", "Jaffa", "Karachi", "Kassel", "Kazan", "Kingston", "Lagos",
        "Lahore", "Lausanne", "Leeds", "Leiden", "Leuven", "Lille", "Lima", "Limerick", "Linz",
        "Liverpool", "London", "Lucca", "Lugano", "Lund", "Madrid", "Mainz", "Malaga", "Mantua",
        "Melbourne", "Memphis", "Messina", "Metz", "Milan", "Minsk", "Mombasa", "Munich", "Munster",
        "Namur", "Newcastle", "Nicosia", "Norwich", "Nottingham", "Odense", "Oporto", "Orleans",
        "Ostend", "Ottawa", "Oxford", "Padua", "Paris", "Parma", "Perth", "Plymouth", "Portland",
        "Potsdam", "Quito", "Rabat", "Regensburg", "Reykjavik", "Rotterdam", "Salerno", "Santiago",
        "Sarajevo", "Savannah", "Seattle", "Segovia", "Sheffield", "Siena", "Skopje", "Smyrna",
        "Split", "Stavanger", "Stockholm", "Strasbourg", "Stuttgart", "Swansea", "Sydney",
        "Syracuse", "Taranto", "Tbilisi", "Tirana", "Toledo", "Toronto", "Toulouse", "Trento",
        "Trondheim", "Tunis", "Turku", "Valencia", "Valletta", "Venice", "Vigo", "Vilnius",
        "Wellington", "Windsor", "Worcester", "Yerevan",
    ),
    "test": (
        "Adelaide", "Bilbao", "Cologne", "Dublin", "Exeter", "Freiburg", "Geneva", "Helsinki",
        "Innsbruck", "Jakarta", "Kyoto", "Leipzig", "Montreal", "Naples", "Oslo", "Prague",
        "Ravenna", "Salzburg", "Tallinn", "Uppsala", "Verona", "Warsaw", "York", "Zurich",
        "Aberdeen", "Bristol", "Cardiff", "Durban", "Edinburgh", "Faro", "Granada", "Hamburg",
        "Lucerne", "Marseille", "Nairobi", "Osaka", "Palermo", "Rostock", "Tampere", "Trieste",
    ),
}
ADJECTIVES: dict[Split, tuple[str, ...]] = {
    "train": (
        "amber", "blue", "brass", "copper", "crooked", "dusty", "early", "faded", "gilded", "green",
        "hollow", "iron", "jade", "large", "leather", "marble", "narrow", "oaken", "painted",
        "quiet", "red", "silver", "square", "tall", "velvet", "white", "wooden", "yellow",
        "antique", "bent", "blunt", "bright", "broad", "brown", "cheap", "clean", "coarse", "cold",
        "cracked", "curved", "damp", "deep", "dented", "double", "dull", "elegant", "empty",
        "fancy", "fine", "flat", "foreign", "fragile", "fresh", "frosted", "glass", "gleaming",
        "glossy", "handsome", "hidden", "huge", "humble", "indigo", "jewelled",
        "knitted", "lavender", "lemon", "light", "linen", "lively", "lost", "low", "maroon",
        "massive", "mended", "metal", "miniature", "modern", "mossy", "muddy", "nickel", "noisy",
        "odd", "old", "olive", "open", "ornate", "oval", "patched", "pink", "plain", "plated",
        "plum", "pocket", "polished", "porcelain", "precious", "pretty", "quaint", "ragged", "rare",
        "rough", "royal", "ruby", "rustic", "satin", "scarlet", "scratched", "shabby", "shiny",
        "short", "silent", "silk", "simple", "slim", "small", "smooth", "soft", "spare", "speckled",
        "spotted", "steel", "stone", "straight", "strange", "strong", "sturdy", "teak", "thick",
        "thin", "tiny", "torn", "turquoise", "twisted", "ugly", "unfinished", "used", "valuable",
        "violet", "walnut", "warm", "wax", "wide", "wicker", "wild", "worn", "wrought",
    ),
    "test": (
        "ancient", "black", "bronze", "broken", "carved", "cedar", "clay", "crimson", "dark",
        "ebony", "enamelled", "folding", "golden", "grey", "heavy", "ivory", "lacquered", "little",
        "orange", "pale", "pewter", "purple", "round", "rusty", "slender", "striped", "tin",
        "woven",
    ),
}
THINGS: dict[Split, tuple[str, ...]] = {
    "train": (
        "anchor", "barrel", "bell", "cabinet", "camera", "clock", "compass", "drum", "engine",
        "fiddle", "globe", "hammock", "inkwell", "kettle", "ladder", "loom", "map", "mirror",
        "organ", "piano", "pump", "saddle", "sledge", "statue", "stove", "telescope", "violin",
        "wagon", "accordion", "album", "almanac", "amulet", "atlas", "axe", "bagpipe", "balloon",
        "banjo", "banner", "barometer", "bench", "blanket", "boat", "bowl", "box", "bracelet",
        "bridge", "bucket", "bust", "cage", "calendar", "candlestick", "canoe", "canvas", "cape",
        "carpet", "carriage", "cart", "casket", "chain", "chair", "clarinet", "cloak", "coat",
        "collar", "comb", "cradle", "cupboard", "curtain", "dagger", "dial", "diary", "doll",
        "door", "dress", "fan", "fence", "flag", "flask", "flute", "fork", "frame", "fur", "gate",
        "gong", "gown", "hat", "helmet", "horn", "hourglass", "jacket", "jar", "jewel", "jug",
        "kite", "knife", "lamp", "ledger", "lens", "lock", "locket", "lute", "machine", "mandolin",
        "manuscript", "mask", "mast", "mattress", "medal", "mill", "necklace", "needle", "net",
        "oar", "oboe", "ornament", "pail", "painting", "pan", "parasol", "parcel", "pendant",
        "photograph", "pipe", "pistol", "pitcher", "plate", "pot", "puppet", "puzzle", "raft",
        "rake", "razor", "ribbon", "rifle", "robe", "rocket", "rope", "rug", "sail", "scale",
        "sceptre", "scroll", "sculpture", "seal", "shelf", "shovel", "sketch", "sofa", "spade",
        "sphere", "stamp", "stool", "sword", "table", "tablet", "tapestry", "tent", "tool", "torch",
        "tower", "toy", "trap", "tray", "trunk", "tub", "tunic", "veil", "viola", "waistcoat",
        "watch", "wheel", "whip", "wig", "wreath", "yoke",
    ),
    "test": (
        "armchair", "basket", "bicycle", "cello", "chandelier", "chest", "crown", "desk", "easel",
        "fountain", "guitar", "harp", "kayak", "lantern", "microscope", "oven", "plough",
        "press", "quilt", "radio", "sewing box", "shield", "sundial", "trumpet", "typewriter",
        "vase", "wheelbarrow", "windmill",
    ),
}
SMALL_THINGS: dict[Split, tuple[str, ...]] = {
    "train": (
        "apple", "ball", "book", "bottle", "candle", "coin", "football", "hammer", "key", "milk",
        "pencil", "ring", "spoon", "umbrella",
    ),
    "test": (
        "biscuit", "brush", "cup", "feather", "glove", "lemon", "letter", "pebble", "purse",
        "scarf", "shell", "thimble", "towel", "whistle",
    ),
}
ROOMS: dict[Split, tuple[str, ...]] = {
    "train": (
        "kitchen", "garden", "bedroom", "bathroom", "hallway", "office", "cellar", "library",
        "workshop", "nursery",
    ),
    "test": (
        "balcony", "classroom", "conservatory", "courtyard", "dining room", "laundry", "loft",
        "pantry", "studio", "veranda",
    ),
}
# fmt: on

# Sounds of names that are made up.
_BEGIN = "b br c ch cl d dr f fl g gr h j k kl l m n p pr qu r s sh sk st t th tr v w y z"
_MIDDLE = "a a e e i i o o u ai au ea ei ia ie io oa ou"
_BETWEEN = "b d g k l ld ll lm m mm n nd ng nn p r rd rk rl rn rr s ss st t th tt v z"
_LAST = "a ak an ard as e ek el en er es eth i ic in is o ock old on or os und us y"


def invented(rng: random.Random) -> str:
    """A name that nobody has, and no split for tests."""
    while True:
        sounds = [_BEGIN, *[_MIDDLE, _BETWEEN] * rng.randint(1, 2), _LAST]
        name = "".join(rng.choice(one.split()) for one in sounds).capitalize()
        if not any(name in pool["test"] for pool in (PEOPLE, FAMILIES, TOWNS)):
            return name
