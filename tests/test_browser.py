"""What MLflow's server says of a swept store, and what a real browser makes of its pages and of the report.

Headless Chromium and its driver are taken from the path; without them the tests skip. Screenshots are kept in the
folder that FEDLOOM_SCREENSHOTS names, else in pytest's own.
"""

import json
import os
import shutil
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient
from recorded import experiment, record, record_parent
from served import served
from typer.testing import CliRunner

from fedloom.jobs.main import app
from fedloom.platform.tracking import Tracking
from fedloom.platform.tracking_store import sqlite_uri

WAIT_S = 60
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1400,1000",
)
# Relative luminances of text and of what is behind it, by the definition of WCAG 2.2; (lighter + .05) / (darker + .05).
CONTRAST = """
const parts = colour => colour.match(/[0-9.]+/g).map(Number);
const light = colour => parts(colour).slice(0, 3).map(c => c / 255).map(
    c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = e => {
    while (e && parts(getComputedStyle(e).backgroundColor)[3] === 0) e = e.parentElement;
    return getComputedStyle(e).backgroundColor;
};
const texts = [...document.querySelectorAll('h1, h2, h3, p, li, a, th, td, caption span, figcaption, .tag')];
return Math.min(...texts.map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}));
"""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*noload.*")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with its driver on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return the folder for screenshots."""
    named = os.environ.get("FEDLOOM_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Return a store with a sweep of two methods and two seeds, its parent, a child, and the report's file."""
    folder = tmp_path_factory.mktemp("swept") / "a place, 100%20 mine?"  # names as users have them
    folder.mkdir()
    tracking = Tracking(sqlite_uri(folder / "mlflow.db"))
    parent = record_parent(tracking, "ranks")
    for method, accuracy in (("florist", 0.8), ("fedit", 0.7)):
        for seed in (0, 1):
            reached = accuracy + 0.01 * seed * (1 if method == "fedit" else 2)
            child = record(tracking, experiment(method, seed), accuracy=reached, parent=parent)
    done = CliRunner().invoke(app, ["compare", "ranks", "--html", f"{folder}/r.html", "--tracking-uri", tracking.uri])
    assert done.exit_code == 0, done.output
    return tracking, parent, child, folder / "r.html"


@pytest.fixture(scope="module")
def server(swept, tmp_path_factory):
    """Return the address of a server of that store, and the working directory in which it runs."""
    folder = tmp_path_factory.mktemp("server")
    with served(swept[0].uri, folder) as address:
        yield address, folder


def ask(address, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def test_the_ui_shows_runs_and_their_artifacts(swept, server):
    """The command starts MLflow's server; over HTTP it lists the run, its metrics and its files, and serves them."""
    tracking, (address, folder) = swept[0], server
    described = experiment()
    with tracking.run(described) as run:
        run.log(1, {"eval/accuracy": 0.75})
        run.text("reports/clients.csv", "id,examples\n")
    listed = ask(f"{address}/api/2.0/mlflow/runs/search", {"experiment_ids": [tracking._experiment_id]})
    shown = {entry["info"]["run_id"]: entry["data"] for entry in json.loads(listed)["runs"]}[run.run_id]
    assert {"key": "eval/accuracy", "value": 0.75} in [
        {name: metric[name] for name in ("key", "value")} for metric in shown["metrics"]
    ]
    query = urllib.parse.urlencode({"run_id": run.run_id, "path": "reports"})
    files = json.loads(ask(f"{address}/ajax-api/2.0/mlflow/artifacts/list?{query}"))["files"]
    assert [file["path"] for file in files] == ["reports/clients.csv"]
    query = urllib.parse.urlencode({"run_uuid": run.run_id, "path": "reports/clients.csv"})
    assert ask(f"{address}/get-artifact?{query}") == "id,examples\n"
    assert "<title>" in ask(address)
    # The same server is a tracking server: runs are recorded over HTTP as well.
    with Tracking(address, experiment_name="remote").run(described) as remote:
        remote.log(0, {"eval/loss": 1.0})
    assert MlflowClient(tracking_uri=tracking.uri).get_run(remote.run_id).info.status == "FINISHED"
    assert [path.name for path in folder.iterdir()] == ["log"]


def found(browser, selector):
    """Wait for an element that can be seen."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support import expected_conditions
    from selenium.webdriver.support.wait import WebDriverWait

    seen = expected_conditions.visibility_of_element_located((By.CSS_SELECTOR, selector))
    return WebDriverWait(browser, WAIT_S).until(seen, selector)


@pytest.mark.browser
@pytest.mark.timeout(400)
def test_the_ui_shows_the_sweep_its_runs_a_chart_and_the_report(browser, swept, server, pictures):
    """From the list of runs to the parent, to a child's curve, and to the report inside MLflow's own page."""
    _, parent, child, _ = swept
    runs = f"{server[0]}/#/experiments/1/runs"
    browser.get(runs)
    assert found(browser, f"a[href*='{parent}']").text == "ranks"
    browser.save_screenshot(str(pictures / "runs.png"))

    found(browser, f"a[href*='{parent}']").click()
    assert found(browser, f"a[href*='{child}']").text.startswith("made-up/fedit")
    browser.save_screenshot(str(pictures / "parent.png"))

    browser.get(f"{runs}/{child}/model-metrics")
    assert found(browser, ".js-plotly-plot .scatterlayer path.js-line").get_attribute("d")
    browser.save_screenshot(str(pictures / "metrics.png"))

    browser.get(f"{runs}/{parent}/artifacts/report/report.html")
    browser.switch_to.frame(found(browser, "iframe"))
    assert found(browser, "h1").text == "ranks"
    assert found(browser, "figure svg path").is_displayed()
    browser.switch_to.default_content()
    browser.save_screenshot(str(pictures / "artifact.png"))


@pytest.mark.browser
def test_the_report_opens_offline_light_dark_wide_and_narrow(browser, swept, pictures):
    """Nothing is fetched, nothing is wider than the page, and every text stands out from what is behind it."""
    browser.get_log("browser")  # what pages before this one have said
    browser.set_network_conditions(offline=True, latency=0, throughput=0)
    try:
        browser.get(swept[3].as_uri())
        assert found(browser, "h1").text == "ranks"
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert browser.get_log("browser") == []
        assert len(browser.find_elements("css selector", "figure svg")) >= 8
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            assert browser.execute_script(CONTRAST) >= 4.5
            for width in (1400, 420):
                size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                assert browser.execute_script("return document.documentElement.scrollWidth") <= width
                browser.save_screenshot(str(pictures / f"report-{scheme}-{width}.png"))
    finally:
        browser.delete_network_conditions()
