"""Names that tasks give to people, places and things; no two splits share one."""

from __future__ import annotations

from cometlm.tasks.base import Split

# fmt: off
PEOPLE: dict[Split, tuple[str, ...]] = {
    "train": (
        "Ada", "Basil", "Clara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Imani", "Jonas",
        "Keiko", "Luca", "Mira", "Nadia", "Omar", "Priya", "Quinn", "Rosa", "Stefan", "Tomas",
        "Uma", "Viktor", "Wanda", "Xenia", "Yusuf", "Zoe",
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
        "Sandoval", "Tanaka", "Ulrich", "Varga", "Weiss", "Yilmaz",
    ),
    "test": (
        "Abara", "Bergman", "Conti", "Dahl", "Egger", "Falk", "Gruber", "Haddad", "Ivanov",
        "Jovic", "Keller", "Larsen", "Mbeki", "Novak", "Ortega", "Pires", "Rahman", "Sato",
        "Toth", "Urban", "Vidal", "Wolff", "Zeller",
    ),
}
TOWNS: dict[Split, tuple[str, ...]] = {
    "train": (
        "Antwerp", "Bergen", "Cadiz", "Dresden", "Esbjerg", "Florence", "Ghent", "Halifax",
        "Izmir", "Jena", "Krakow", "Lisbon", "Malmo", "Nantes", "Odessa", "Porto", "Quebec",
        "Riga", "Seville", "Tartu", "Utrecht", "Vienna", "Wismar", "Zagreb", "Aarhus", "Basle",
        "Cork", "Delft", "Essen", "Graz", "Hobart", "Kiel", "Lyon", "Modena", "Nagoya", "Oulu",
        "Pisa", "Rouen", "Sofia", "Turin",
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
        "amber", "blue", "brass", "copper", "crooked", "dusty", "early", "faded", "gilded",
        "green", "hollow", "iron", "jade", "large", "leather", "marble", "narrow", "oaken",
        "painted", "quiet", "red", "silver", "square", "tall", "velvet", "white", "wooden",
        "yellow",
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
        "wagon",
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
