"""One rank of a training job that kills or stops itself at a chosen moment.

    python -m tests.fault RANK MOMENT train CONFIG …

MOMENT is forward, backward, saving, or hang; of rank RANK, in the fourth step.
"""

import os
import signal
import sys

from cometlm.cli.main import run
from cometlm.core.cell import Cell
from cometlm.parallel import p2p
from cometlm.train.trainer import CometTrainer

STEP = 3
late = False


def strike(how):
    """This process is gone, or as good as."""
    os.kill(os.getpid(), signal.SIGSTOP if how == "hang" else signal.SIGKILL)


def before(owner, name, due):
    """Let `due` strike before a function is run."""
    own = getattr(owner, name)

    def changed(*args, **options):
        due(*args)
        return own(*args, **options)

    setattr(owner, name, staticmethod(changed) if owner is p2p._Receive else changed)


def arm(moment):
    """Arrange for the moment."""

    def note_step(trainer, *_):
        global late
        late = trainer.state.global_step >= STEP

    before(CometTrainer, "training_step", note_step)
    if moment in ("forward", "hang"):
        before(Cell, "forward", lambda *_: late and strike(moment))
    elif moment == "backward":
        before(p2p._Receive, "backward", lambda *_: late and strike(moment))
    else:
        own = CometTrainer._save

        def save(trainer, *args, **options):
            own(trainer, *args, **options)
            if late:
                strike(moment)

        CometTrainer._save = save


if __name__ == "__main__":
    victim, moment = sys.argv[1:3]
    sys.argv[1:] = sys.argv[3:]
    if os.environ["RANK"] == victim:
        arm(moment)
    run()
