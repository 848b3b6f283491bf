"""Colours are stable, readable on their background, and apart under simulated colour blindness."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from detente.reports.style import _ORDER, BACKGROUND, PALETTE, SHAPES, places, style_at, svg_sample

# Machado, Oliveira & Fernandes (2009), severity 1.0, for linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    return linear(colour) @ [0.2126, 0.7152, 0.0722]


def contrast(one, other):
    """WCAG 2.2, relative luminance."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def oklab(rgb):
    """Ottosson (2020), from linear RGB."""
    to_cone = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_cone) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_contrast(mode):
    for name, colour in PALETTE[mode].items():
        if name != "grid":
            assert contrast(colour, BACKGROUND[mode]) >= (4.5 if name in ("ink", "muted") else 3.0), name


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_first_six_colours_stay_apart(mode, kind):
    matrix = np.array(BLINDNESS[kind])
    colours = [oklab(matrix @ linear(PALETTE[mode][f"m{i}"])) for i in range(6)]
    # 0.02 in OKLab is about one just noticeable difference.
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > 0.05


def test_every_known_method_has_its_own_colour_and_shape():
    looks = {
        (style.colour, style.shape) for name in _ORDER for style in [style_at(places([name])[name], "exact")]
    }
    assert len(looks) == len(_ORDER) == 31


def test_a_style_does_not_depend_on_the_company():
    alone = places(["cagrad"])["cagrad"]
    assert places(["uniform", "a", "b", "cagrad", "mgda"])["cagrad"] == alone
    assert places(["mine"]) == places(["mine"])
    crowd = [f"method {i}" for i in range(30)]
    found = places([*crowd, *_ORDER])
    assert len(set(found.values())) == 61, "no two share a place while there is room"
    assert found == places([*reversed(crowd), *_ORDER])


def test_more_methods_than_places_is_no_endless_loop():
    assert len(places([f"method {i}" for i in range(100)])) == 100


def test_space_shows_without_colour():
    exact, features, layer = (style_at(1, space) for space in ("exact", "features", "layer"))
    assert len({exact.symbol, features.symbol, layer.symbol}) == 3
    assert len({exact.dash, features.dash, layer.dash}) == 3
    assert exact.colour == features.colour == layer.colour
    assert exact.filled
    assert not features.filled
    assert style_at(1, "exact", variant=1).shape != exact.shape
    assert style_at(1, "something else").symbol.endswith("-dot")


def test_every_shape_can_be_drawn_in_the_legend():
    for place in range(8 * len(SHAPES)):
        assert "NaN" not in svg_sample(style_at(place, "features"))
