"""pretrain.train, with something going wrong: python -m tests.pretrain.sabotaged_train "WHAT" TRAINING ARGUMENTS.

nan 5 6        the output of a block is not a number in steps 5 and 6, the first time that they are done
nan! 5         in every time
loud 5         the loss is 50 nats too high in step 5, the first time
slow 1 0.3     rank 1 sleeps so many seconds in every forward pass
stall 5        the batch of step 5 comes when it has been said that it is waited for
save 4         no checkpoint is written before step 4 has begun

Several of them stand between commas.
"""

import sys
import threading
import time

import torch
import torch.distributed as dist

from pretrain import run, train
from pretrain.checkpoint import save
from pretrain.data import batches

done: set[int] = set()


def sabotage(what, numbers):
    original = run.train_step
    steps = {int(number) for number in numbers} if what in ("nan", "nan!", "loud") else set()

    def broken(engine, *arguments, **named):
        step = current.pop()
        hooks = []
        if step in steps and (what == "nan!" or step not in done):
            target = engine.module if what == "loud" else engine.module.layers[0].mixer
            change = (lambda x: x + 50) if what == "loud" else (lambda x: x * torch.nan)
            hooks.append(target.register_forward_hook(lambda module, inputs, output: in_first(output, change)))
            done.add(step)
        if what == "slow" and dist.get_rank() == int(numbers[0]):
            hooks.append(engine.module.register_forward_pre_hook(lambda *_: time.sleep(float(numbers[1]))))
        try:
            return original(engine, *arguments, **named)
        finally:
            for hook in hooks:
                hook.remove()

    current, heard = [], threading.Event()
    of_run = run.Run.step

    def noting(self, step, following):
        current.append(step)
        if what == "save" and step == int(numbers[0]):
            heard.set()
        return of_run(self, step, following)

    run.train_step, run.Run.step = broken, noting
    if what == "stall":
        batches.STALL_SECONDS = 0.3
        read, say = batches.Batches._read, train.say_stalled

        def slowly(self, portion):
            if portion.first == 4 * (int(numbers[0]) - 1):
                heard.wait()
            return read(self, portion)

        def saying(step, seconds):
            say(step, seconds)
            if step == int(numbers[0]):
                heard.set()

        batches.Batches._read, train.say_stalled = slowly, saying
    if what == "save":
        write = save._write

        def late(*arguments):
            heard.wait()
            return write(*arguments)

        save._write = late


def in_first(output, change):
    """A module's output with its first tensor changed."""
    return change(output) if isinstance(output, torch.Tensor) else (change(output[0]), *output[1:])


if __name__ == "__main__":
    for wrong in sys.argv.pop(1).split(","):
        kind, *rest = wrong.split()
        sabotage(kind, rest)
    train.main()
