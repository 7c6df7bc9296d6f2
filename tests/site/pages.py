"""What the tests of this folder do with a page in the browser."""

import json
from pathlib import Path


def load(browser, page: Path, width: int, dark: bool = False) -> None:
    """Open a page at this width; what was logged before is thrown away."""
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(page.as_uri())


def errors(browser) -> list[str]:
    """What the page has written to the console."""
    return [entry["message"] for entry in browser.get_log("browser")]


def fetched(browser) -> list[str]:
    """The addresses that are neither files nor data of the page itself."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert urls
    return [url for url in urls if not url.startswith(("file://", "data:", "blob:"))]
