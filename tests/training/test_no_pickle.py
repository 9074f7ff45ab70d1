"""A run that trains, saves and resumes unpickles nothing, whatever library asks."""

from tiny import start, write_yaml

WATCHED = """
import sys
def hook(event, arguments):
    if event == "pickle.find_class":
        raise AssertionError(f"unpickles {arguments}")
sys.addaudithook(hook)
from nsa.train import main
sys.exit(main())
"""


def test_a_run_and_its_resumption_unpickle_nothing(tmp_path):
    for steps in (3, 4):  # one worker: processes that prepare data pass each other pickled batches
        arguments = [str(write_yaml(tmp_path)), f"training.steps={steps}", "data.workers=1"]
        arguments += [f"data.cache_dir={tmp_path / 'cache'}"]
        process = start(["-c", WATCHED, *arguments])
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert "after step 3" in output
