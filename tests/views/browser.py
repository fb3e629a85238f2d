"""Headless Chromium with the network cut, for pages that must open offline."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rim_lens.views.text import visible

# What a model, a tokenizer or a user may call a token, a text or a model.
HOSTILE = (
    "<think>",
    "</script><img src=x onerror=window.hit=1>",
    "\U0001f600",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u202ea\x07\n",
    "</think>",
)
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def require_chromium(*modules: str) -> None:
    """Skip where Chromium or one of these modules is missing; on CI that is a failure."""
    missing = [name for name in ("selenium", *modules) if find_spec(name) is None]
    if not (CHROMIUM and DRIVER):
        missing.append("chromium and chromedriver")
    if not missing:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"{', '.join(missing)} must be installed on CI.")
    pytest.skip(f"needs {', '.join(missing)}")


@contextmanager
def offline_chromium(host: str | None = None) -> Iterator[Any]:
    """A driver whose browser can reach no network, or this one host."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    if host is not None:
        options.add_argument(f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {host}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.execute_cdp_cmd("Network.enable", {})
        if host is None:
            driver.execute_cdp_cmd(
                "Network.emulateNetworkConditions",
                {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
            )
        yield driver
    finally:
        driver.quit()


def requests_of(driver: Any) -> list[str]:
    """Addresses asked for since the last call; data written inside the page is no request."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith("data:")]


def errors_of(driver: Any) -> list[str]:
    """What the console said since the last call, content-security reports among it."""
    return [
        entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ]


def open_page(driver: Any, path: Path) -> None:
    """Open a file and wait until its figures are drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(path.as_uri())
    WebDriverWait(driver, 60).until(
        lambda page: page.execute_script(
            "return [...document.querySelectorAll('.plot')].every(plot => plot.dataset.drawn)"
        )
    )


def resize(driver: Any, width: int) -> None:
    """Make the window so wide, and 1 000 high."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False},
    )


@contextmanager
def explorer_page(driver: Any, path: Path) -> Iterator[Any]:
    """An explorer's page at 1 280, drawn; whatever was done in it, it ran no text, asked for nothing and complained of nothing."""
    resize(driver, 1280)
    requests_of(driver), errors_of(driver)
    driver.get(path.as_uri())
    assert driver.execute_script("return document.querySelector('.rlx').dataset.drawn") == "yes"
    yield driver
    assert driver.execute_script("return [window.hit, document.images.length]") == [None, 0]
    assert {*requests_of(driver)} <= {path.as_uri()}
    assert errors_of(driver) == []


def pick(driver: Any, what: str, value: str) -> None:
    """Choose from a menu of an explorer."""
    driver.execute_script(
        "const menu = document.querySelector(`[data-what=${arguments[0]}]`); menu.value = arguments[1];"
        "menu.dispatchEvent(new Event('change'))",
        what,
        value,
    )


def harmless(driver: Any, path: Path, texts: Sequence[str] = ()) -> None:
    """Open a page and hold that it asks for nothing, may ask for nothing, complains of nothing, and shows texts literally."""
    requests_of(driver), errors_of(driver)
    open_page(driver, path)
    policy = driver.execute_script(
        "return document.querySelector('meta[http-equiv=Content-Security-Policy]').content"
    )
    assert policy.startswith("default-src 'none'")
    scripts = next((part for part in policy.split(";") if "script-src" in part), "")
    assert not {"'unsafe-inline'", "'unsafe-eval'", "'self'", "*"} & set(scripts.split())
    driver.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    _wait_for_texts(driver, texts)
    assert driver.execute_script("return [window.hit, document.images.length]") == [None, 0]
    assert requests_of(driver) == [path.as_uri()]
    assert [said for said in errors_of(driver) if "WebGL" not in said] == []  # a headless browser's own
    # The network would refuse as well, so this asks who refused: the page's own policy, before anything left it.
    blocked = driver.execute_async_script(
        "const done = arguments[0]; document.addEventListener('securitypolicyviolation', event => done(event.violatedDirective));"
        "fetch('https://example.org/').catch(() => setTimeout(() => done('not by its policy'), 1000))"
    )
    assert blocked == "connect-src"
    requests_of(driver), errors_of(driver)


def _wait_for_texts(driver: Any, texts: Sequence[str]) -> None:
    """Until each stands in the page, spaces aside; some pages draw when they like."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    wanted = {"".join(visible(text).split()) for text in texts}
    seen = "return document.body.innerText.replace(/\\s+/g, '')"

    def missing(_: Any = None) -> set[str]:
        text = driver.execute_script(seen)
        return {one for one in wanted if one not in text}

    try:
        WebDriverWait(driver, 60).until(lambda _: not missing())
    except TimeoutException:
        pytest.fail(f"not in the page: {missing()}")


def act_until(
    driver: Any, find: Callable[[Any], Any], seen: Callable[[Any], Any], *, click: bool = True
) -> Any:
    """Point at an element, and click it, again and again as a user would, until something is seen.

    A busy browser may still be laying out the page when the pointer arrives, and miss it.
    """
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    for tries_left in reversed(range(6)):
        element = find(driver)
        driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        pointer = ActionChains(driver).move_by_offset(0, 0).move_to_element(element)
        (pointer.click() if click else pointer).perform()
        try:
            return WebDriverWait(driver, 8).until(seen)
        except TimeoutException:
            if not tries_left:
                raise
    raise AssertionError
