"""What composing skills is worth: adapters trained for it, merged by every method, judged by exact match.

loramix bench composition --data DIR                   # on a GPU; `--quick` is the same, much smaller, on a CPU
python -m benchmarks.composition --data DIR            # the same where typer and rich are not installed

study.py     which skills are trained and composed, and how much of everything
groups.py    what is asked and compared, and the adapters that it needs
data.py      tasks, split into train, validation and test
lanes.py     training, several adapters side by side
judge.py     exact match of a model that wears a merged adapter
learned.py   weights that are learned, or drawn
work.py      the folder from which a stopped run goes on
run.py       seed by seed: train, learn, judge
record.py    figures of what was judged; tables.py and plots.py show them
"""

import sys
from pathlib import Path

# The examples know each other by bare names, as scripts do.
sys.path.append(str(Path(__file__).parents[2] / "examples"))
