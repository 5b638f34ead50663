"""Command-line and YAML parser, and exit codes of scripts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from common.config import field_names, from_dict, load_yaml, parse, parse_sections, run_main, save_yaml, to_dict
from common.errors import UserError


@dataclass
class Wheel:
    """The wheel."""

    radius: float = 0.5
    """Radius in metres."""
    kind: Literal["spoke", "disc"] = "spoke"
    """Construction of the wheel."""
    range: tuple[float, float] = (0.25, 4.0)
    """Smallest and largest radius."""

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise UserError(f"wheel.radius must be above 0, but is {self.radius}")


@dataclass(frozen=True)
class Axle:
    """An axle."""

    length: float = 1.0
    """Length in metres."""


@dataclass
class Cart:
    """The cart."""

    wheel: Wheel = field(default_factory=Wheel)
    """The wheel's section."""
    name: str | None = None
    """Name of the cart."""
    steps: int = 10
    """Length of the ride."""
    spare: Wheel = field(default_factory=Wheel)
    """The spare wheel's section."""
    axles: list[Axle] = field(default_factory=list)
    """Axles, each a section."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"steps must be 0 or more, but is {self.steps}")


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_command_line_overrides_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    path = recipe(tmp_path, "wheel:\n  radius: 2e-1\n  kind: disc\nsteps: 3\n")
    cart = parse(Cart, ["--config", path, "--wheel.radius", "0.75", "--name=x"])
    assert cart == Cart(Wheel(0.75, "disc"), "x", 3)
    assert isinstance(cart.wheel, Wheel) and cart.wheel.range == (0.25, 4.0)


@pytest.mark.parametrize(
    ("text", "named", "meant"),
    [
        ("--wheel.radios=3", "wheel.radios", "wheel.radius"),
        ("--stepps=3", "stepps", "steps"),
        ("--radius=3", "radius", "wheel.radius' or 'spare.radius"),
        ("--radis=3", "radis", "wheel.radius' or 'spare.radius"),
        ("wheel: {radios: 3}", "wheel.radios", "wheel.radius"),
        ("stepps: 3", "stepps", "steps"),
        ("weel: {radius: 3}", "weel.radius", "wheel.radius"),
        ("--step=3", "step", "steps"),  # no abbreviations: a new field would change their meaning
    ],
)
def test_an_unknown_field_is_an_error_with_the_nearest_name(tmp_path: Path, text: str, named: str, meant: str) -> None:
    arguments = [text] if text.startswith("--") else ["--config", recipe(tmp_path, text)]
    with pytest.raises(UserError, match=f"unknown field '{named}': did you mean '{meant}'"):
        parse(Cart, arguments)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("--wheel.radius=wide", ["wheel.radius", "wide", "float"]),
        ("--steps=1.5", ["steps", "1.5", "int"]),
        ("--wheel.kind=square", ["wheel.kind", "square", "spoke", "disc"]),
        ("wheel: {radius: wide}", ["wheel.radius", "wide", "float"]),
        ("wheel: 5", ["wheel", "mapping", "5"]),
        ("steps: 3\nwheel:", ["wheel", "mapping", "None"]),
        ("--wheel.radius=-1", ["wheel.radius", "-1", "above 0"]),
        ("--steps=-4", ["steps", "-4", "0 or more"]),
        ("a: [b", ["pars"]),
        ("--config=/nowhere.yaml", ["/nowhere.yaml", "not exist"]),
    ],
)
def test_an_invalid_value_is_an_error_with_field_value_and_expectation(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    arguments = [text] if text.startswith("--") else ["--config", recipe(tmp_path, text)]
    with pytest.raises(UserError) as caught:
        parse(Cart, arguments)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "<class" not in str(caught.value)


@dataclass(frozen=True)
class Load:
    """Restricted values."""

    boxes: PositiveInt = 1
    """Boxes."""
    share: ClosedUnitInterval = 0.5
    """Loaded share."""
    limit: NonNegativeInt | None = None
    """Limit."""
    goods: list[Literal["hay", "milk"]] = field(default_factory=list)
    """Goods."""


def test_restricted_values_are_plain_numbers_and_refused_with_field_value_and_expectation(tmp_path: Path) -> None:
    load = parse(Load, ["--boxes=3", "--share=1", "--limit=2", "--goods=[hay]"])
    assert [type(value) for value in (load.boxes, load.share, load.limit)] == [int, float, int]
    save_yaml(load, tmp_path / "load.yaml")
    assert from_dict(Load, load_yaml(tmp_path / "load.yaml")) == load
    for argument, message in (
        ("--boxes=0", "boxes is 0: expected an integer above 0"),
        ("--boxes=1.5", "boxes is '1.5': expected an integer above 0"),
        ("--share=1.5", "share is 1.5: expected a number from 0 to 1"),
        ("--share=half", "share is 'half': expected a number from 0 to 1"),
        ("--limit=-1", "limit is -1: expected an integer, 0 or more or null"),
        ("--goods=[hay,milc]", "goods is 'milc', expected one of hay, milk. Did you mean 'milk'?"),
    ):
        with pytest.raises(UserError) as caught:
            parse(Load, [argument])
        assert str(caught.value) == message


def test_several_settings_classes_share_one_command_line() -> None:
    sections = {None: [Load, Axle], "wheel": [Wheel]}
    load, axle, wheel = parse_sections(sections, ["--boxes=2", "--length=3", "--wheel.kind=disc"])
    assert (load, axle, wheel) == (Load(2), Axle(3.0), Wheel(kind="disc"))
    with pytest.raises(UserError, match=r"unknown field 'wheel\.radios': did you mean 'wheel\.radius'"):
        parse_sections(sections, ["--wheel.radios=3"])


def test_help_shows_every_field_with_the_string_under_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(Cart, ["--help"], description="Rides a cart.")
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for text in ("Rides a cart.", "Radius in metres.", "Construction of the wheel.", "Smallest and largest radius.",
                 "Name of the cart.", "Length of the ride."):  # fmt: skip
        assert text in shown
    assert all(f"--{name}" in shown for name in field_names(Cart))


def test_print_config_and_save_yaml_read_back_as_the_same_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cart = Cart(Wheel(1e-5, "disc", (1.0, 2.0)), "N\u00e4me: #1", 7)
    path = tmp_path / "cart.yaml"
    save_yaml(cart, path)
    assert json.loads(json.dumps(to_dict(cart))) == to_dict(cart)  # plain JSON: no tuples
    assert parse(Cart, ["--config", str(path)]) == cart
    assert from_dict(Cart, load_yaml(path)) == cart == from_dict(Cart, to_dict(cart))
    with pytest.raises(SystemExit):
        parse(Cart, ["--config", str(path), "--print_config"])
    printed = recipe(tmp_path, capsys.readouterr().out)
    assert parse(Cart, ["--config", printed]) == cart


def test_a_list_of_sections_is_read_from_a_file_and_written_back(tmp_path: Path) -> None:
    cart = parse(Cart, ["--config", recipe(tmp_path, "axles:\n  - {length: 2}\n  - {length: 1}\n")])
    assert cart.axles == [Axle(2.0), Axle(1.0)]
    assert parse(Cart, ["--axles", '[{"length": 2}, {"length": 1}]']) == from_dict(Cart, to_dict(cart)) == cart
    with pytest.raises(UserError, match="axles"):
        parse(Cart, ["--axles", '[{"lenght": 2}]'])
    with pytest.raises(UserError, match="^axles: length: Expected a float"):
        parse(Cart, ["--axles", '[{"length": "x"}]'])


@pytest.mark.parametrize(
    "text",
    [
        "wheel: {class_path: planted.Thing}",
        "axles: [{class_path: planted.Thing}]",
        "wheel: !!python/object/apply:planted.thing [1]",
    ],
)
def test_a_configuration_cannot_name_code_to_run(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = recipe(tmp_path, text)
    with pytest.raises(UserError):
        parse(Cart, ["--config", path])
    with pytest.raises(UserError):
        from_dict(Cart, load_yaml(path))
    assert not (tmp_path / "ran").exists()


class OtherError(UserError):
    """User error of another module."""


@pytest.mark.parametrize("recipe", ["config: {secret}", "wheel: {secret}", "config: {secret}\nwheel:\n  radius: 1"])
def test_the_content_of_a_file_that_a_recipe_names_is_not_shown(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "secret").write_text("root:x:0:0:hidden\n")
    (tmp_path / "recipe.yaml").write_text(recipe.format(secret=tmp_path / "secret"))
    with pytest.raises(UserError) as error:
        parse(Cart, ["--config", str(tmp_path / "recipe.yaml")])
    assert "hidden" not in str(error.value)


def test_aliases_are_refused_before_they_are_multiplied(tmp_path: Path) -> None:
    """Nine levels of nine aliases each stand for 400 million values."""
    lines = ["a: &a [" + ",".join("x" * 9) + "]"]
    lines += [
        f"{name}: &{name} [{','.join([f'*{last}'] * 9)}]" for last, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text("\n".join(lines))
    with pytest.raises(UserError, match="alias"):
        parse(Cart, ["--config", str(bomb)])
    with pytest.raises(UserError, match="alias"):
        load_yaml(bomb)
    (tmp_path / "plain.yaml").write_text("name: 'R&D *'\n")
    assert load_yaml(tmp_path / "plain.yaml") == {"name": "R&D *"}


@pytest.mark.parametrize(
    ("error", "status", "shown", "traceback"),
    [
        (UserError("steps is -1"), 2, "error: steps is -1\n", False),
        (OtherError("no such file"), 2, "error: no such file\n", False),
        (ValueError("a bug"), 1, "ValueError: a bug", True),
        (KeyboardInterrupt(), 130, "interrupted", False),
    ],
)
def test_user_mistakes_end_without_a_traceback_and_bugs_with_one(
    error: BaseException, status: int, shown: str, traceback: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    output = capsys.readouterr().err
    assert caught.value.code == status
    assert shown in output and ("Traceback" in output) == traceback


def test_the_exit_status_is_the_value_of_main_or_0() -> None:
    for returned, status in ((None, 0), (3, 3)):
        with pytest.raises(SystemExit) as caught:
            run_main(lambda returned=returned: returned)
        assert caught.value.code == status
