"""A policy that plays a plan: out, re-shard there and back, another model, in."""

from testbed.policies import Command, Placement, SetLayout, View


class Plan:
    """3 s: out to node 1; 7 s: TP8 to 2 x TP4; 11 s: back; 14 s: a smaller model; 18 s: in."""

    period_s = 1.0

    def step(self, view: View) -> list[Command]:
        big, small = view.models.index("llama-2-70b"), view.models.index("llama-2-13b")
        eight = (Placement(0, 8, 0, big),)
        fours = (Placement(0, 4, 0, big), Placement(4, 4, 0, big))
        plan = {
            3: (1, eight),
            7: (0, fours),
            11: (0, eight),
            14: (1, (Placement(0, 2, 0, small), Placement(2, 2, 0, small, "fp8"))),
            18: (1, ()),
        }
        if round(view.now_s) not in plan:
            return []
        node, layout = plan[round(view.now_s)]
        return [SetLayout(node, layout, why=f"planned for {view.now_s:g} s")]
