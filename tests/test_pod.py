"""POD, the markup of Perl's manual: what is left of it as plain text."""

import pytest

from cometlm.data.pod import plain, sections
from tests.tasks.test_documents import POD


def test_pod_becomes_plain_text():
    (name, question, also) = sections(POD.format(name="perlfaq6", number=8))
    assert name == (1, "NAME", "perlfaq6 - lamps")
    assert question == (
        2,
        "How do I light lamp 8 of perlfaq6?",
        "You may use $lamp->light(8) or see Oil in perllamp.\n\n"
        "    light(8);  # as it E<lt>stands\n\n* wait",
    )
    assert also[2] == "Lamp 8 is in the cellar."


@pytest.mark.parametrize(
    ("pod", "text"),
    [
        ("C<<< a << b >>> and C<$x E<gt> 1>", "a << b and $x > 1"),
        ("B<I<nested> C<< <code> >>>", "nested <code>"),
        ("L<perlfunc/open> L<perlop> Z<>", "open in perlfunc perlop "),
        ("L<http://a.b/c> L</Files> L<the page|http://a.b>", "http://a.b/c Files the page"),
        ("E<eacute>E<0x41>E<66>", "éAB"),
        ("if ($a < $b) { }", "if ($a < $b) { }"),
    ],
)
def test_formatting_codes(pod, text):
    assert plain(pod) == text
