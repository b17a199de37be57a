import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.config.templates import parse_template
from shadowtune.errors import ConfigError
from tests.support.properties import property_test


def test_pieces_are_literal_text_and_the_field_after_it():
    assert parse_template("Request: {text}\nIntent:") == [("Request: ", "text"), ("\nIntent:", None)]
    assert parse_template("{a}{b c}") == [("", "a"), ("", "b c")]


def test_doubled_braces_are_literal():
    pieces = parse_template('{{"q": "{question}"}}')
    assert "".join(literal + (f"<{name}>" if name else "") for literal, name in pieces) == '{"q": "<question>"}'


@pytest.mark.parametrize(
    "template",
    ["{text.upper}", "{text[0]}", "{text!r}", "{text:>10}", "{}", "{a:{b}}", "{__class__.__init__}"],
)
def test_anything_but_a_plain_name_is_refused(template):
    with pytest.raises(ConfigError, match="only plain names"):
        parse_template(template)


@pytest.mark.parametrize("template", ["{text", "text}", "{{text}", "{a!}", "{"])
def test_unmatched_braces_are_refused_with_the_way_out(template):
    with pytest.raises(ConfigError, match=r"write \{\{ and \}\} for literal braces"):
        parse_template(template)


@pytest.mark.parametrize("template", ["", "no field", "{{text}}"])
def test_a_template_without_a_field_is_refused(template):
    with pytest.raises(ConfigError, match="names no field"):
        parse_template(template)


@property_test
@given(st.text())
def test_any_text_is_a_template_with_a_field_or_a_config_error(text):
    with contextlib.suppress(ConfigError):
        assert any(name for _, name in parse_template(text))


def test_line_breaks_do_not_break_the_line():
    with pytest.raises(ConfigError) as caught:
        parse_template("a\nb")
    assert "\n" not in str(caught.value)
