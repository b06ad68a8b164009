"""
The learners that stage 3's critic is trained on, by turns.

A critic trained at one learner that never moves memorises one direction; trained only where real steps lead,
it does not know where its own signal leads. So half of them step as arms do, half from real targets.
"""
import copy
import math

from checkpoints import copied

SIZE = 4
STEPS = 100  # steps after which one starts again from the pretrained learner
WORSE = 0.2  # nats of the outer loss above its best at which it does so sooner


class Pool:
    """SIZE learners: members, dict(learner, optimizer, age, best) each, on the device `where`; an empty one
    starts from what is pretrained. restarts: how many started again for getting worse."""

    def __init__(self, where):
        self.members, self.restarts, self.where = [{} for _ in range(SIZE)], 0, where

    def take(self, turn, parts, mover):
        """The member whose turn it is, lent to `mover`: dict(learner=module, optimizer=its optimizer).

        parts: learner and optimizer that are pretrained.
        """
        member = self.members[turn]
        if not member:
            state = copy.deepcopy(parts["optimizer"].state_dict())
            member.update(learner=parts["learner"].state_dict(), optimizer=state, age=0, best=math.inf)
        for name, part in mover.items():
            part.load_state_dict(member[name])
        return member

    def give_back(self, member, mover, judged):
        """Keeps what `mover` has become by a step, judged by `judged` nats of outer loss, or starts anew."""
        worse = judged > member["best"] + WORSE
        member.update({name: copied(part.state_dict(), self.where) for name, part in mover.items()},
                      age=member["age"] + 1, best=min(member["best"], judged))
        if worse or member["age"] >= STEPS:
            self.restarts += member["age"] < STEPS
            member.clear()

    def state_dict(self):
        return dict(members=self.members, restarts=self.restarts)

    def load_state_dict(self, state):
        self.members, self.restarts = copied(state["members"], self.where), state["restarts"]
