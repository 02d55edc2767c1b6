"""The report in a browser: nothing leaves the page, tables sort, curves are switched by loss and by seed."""

import json
import re
import shutil
import subprocess

import pytest

from tests.experiments.test_tables import pipeline_root, run_tables

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
TRIAL = """
<script>
const failures = [];
window.addEventListener("error", event => failures.push(String(event.message)));
window.addEventListener("load", () => setTimeout(() => {
  const plots = () => [...document.querySelectorAll("#curves .js-plotly-plot")];
  const shown = () => plots().map(plot => plot.data.map(trace => trace.name));
  const click = name => document.querySelector(`input[name="${name}"]`).click();
  const rows = table => [...document.querySelectorAll(`#${table} tbody tr`)];
  const column = (table, place) => rows(table).map(row => row.cells[place].textContent);
  const found = {failures, plots: shown(), requests: performance.getEntriesByType("resource").map(entry => entry.name)};
  click("loss tvd"); found.withoutLoss = shown()[0]; click("loss tvd");
  click("seed 2"); found.withoutSeed = shown()[0]; click("seed 2");
  found.all = shown()[0];
  const head = document.querySelectorAll("#gamma_3 th")[2];
  head.click(); found.down = column("gamma_3", 2);
  head.click(); found.up = column("gamma_3", 2);
  document.querySelectorAll("#gamma_3 th")[4].click(); found.gain = column("gamma_3", 4);
  const result = document.createElement("pre"); result.id = "trial"; result.textContent = JSON.stringify(found);
  document.body.append(result);
}, 500));
</script>
"""


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """Return what the page shows in Chromium after each click."""
    root = tmp_path_factory.mktemp("page")
    report = run_tables(pipeline_root(root))
    page = (report / "report.html").read_text()
    (report / "trial.html").write_text(page.replace("<head>", "<head>" + TRIAL, 1))
    command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={root}/profile", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{report}/trial.html"], capture_output=True, text=True, timeout=120)
    return json.loads(re.search(r'<pre id="trial">(.*?)</pre>', done.stdout, re.DOTALL).group(1).replace("&amp;", "&"))


pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def test_the_page_loads_nothing_and_raises_no_error(trial):
    assert trial["failures"] == []
    assert trial["requests"] == []


def test_each_yardstick_that_was_logged_has_a_plot_with_every_seed_and_the_mean(trial):
    assert len(trial["plots"]) == 3  # the test's logs have no block efficiency
    for names in trial["plots"]:
        assert names == ["kld, seed 1", "kld, seed 2", "kld, mean", "tvd, seed 1"]


def test_curves_are_switched_by_loss_and_by_seed(trial):
    assert trial["withoutLoss"] == ["kld, seed 1", "kld, seed 2", "kld, mean"]
    assert trial["withoutSeed"] == ["kld, seed 1", "tvd, seed 1"]
    assert trial["all"] == trial["plots"][0]


def test_a_column_sorts_both_ways_and_blank_cells_go_last(trial):
    down = [float(cell.split()[0]) for cell in trial["down"]]
    assert down == sorted(down, reverse=True)
    assert down[0] > down[-1]
    assert [float(cell.split()[0]) for cell in trial["up"]] == sorted(down)
    assert trial["gain"][-2:] == ["", ""]
    assert all(trial["gain"][:-2])
