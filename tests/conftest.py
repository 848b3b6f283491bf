"""What every test shares: fixed threads, hypothesis profiles, and a browser where one is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

# Before numpy and torch start their pools: results must not depend on how many workers share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

IN_CI = os.environ.get("CI", "").lower() in {"1", "true"}

# Examples time out by pytest's clock, not by hypothesis': the first call of a torch operation is slow.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, print_blob=True
)
settings.load_profile("ci" if IN_CI else "local")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `browser` is skipped by name where no browser is installed; in CI that is a failure."""
    if item.get_closest_marker("browser") and not (CHROMIUM and CHROMEDRIVER):
        reason = "needs a browser: install Debian's packages chromium and chromium-driver"
        if IN_CI:
            pytest.fail(f"{item.name} {reason}")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The project's top folder."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`call("run", "demo")` carries out a command in this process: its exit code, what it printed, what it told."""
    from detente.cli import main

    def carry_out(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        out, err = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, out, err

    return carry_out


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[object]:
    """A headless Chromium with an empty profile (selenium's driver); mark the test `browser`.

    `browser.get_log("browser")` returns what the page wrote to the console.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--window-size=1400,1000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))
    try:
        yield driver
    finally:
        driver.quit()
