"""
The report of a hack or an alarm: a page in hacks/ that a newcomer can read, and a picture beside it.

What changed first; drift or exploit, by a cross examination of the critic and the learner of now and of the
snapshot; the texts, with what differs marked; the row of the log.
"""
from plot import draw_report


def marked(encoding, ids, reference):
    """Text of `ids` in which runs of tokens that differ from `reference` stand in ⟦ ⟧; None shows as ∅."""
    text, inside = "", False
    for a, b in zip(ids, reference):
        if (a != b) != inside:
            text += "⟧" if inside else "⟦"
            inside = not inside
        text += "∅" if a is None else encoding.decode([a], errors="replace").replace("\n", "⏎")
    return text + "⟧" * inside


def verdict(judged):
    """What the cross examination says. judged: {(critic, outputs): agreement}, "then" | "now" each."""
    base = judged["then", "then"]
    drift, exploit = judged["now", "then"] < base - 0.1, judged["then", "now"] < base - 0.1
    if drift and exploit:
        return "Both: today's critic misjudges even the old outputs, and the old critic misjudges today's."
    if drift:
        return "Drift: the old critic judges today's outputs right; today's misjudges even the old ones."
    if exploit:
        return "Exploit: today's critic judges the old outputs as well as ever; today's outputs fool it."
    return ("Neither: the critic judges as at first. If gold falls too, the alarm was false; if it rises, "
            "the signal was wrong from the start: a biased teacher, or an observation not the learner's.")


def write_report(run, row, why, changed, judged, texts, encoding):
    """hacks/NNN.md: what happened, in an order in which a newcomer can read it, and a picture beside it.

    row: of the log. why: "gold" or the names of the streams that alarmed. changed: [(step, stream)]. judged:
    see `verdict`. texts: {"then" | "now": (output, observation, target)}, lists of ids. Returns what the
    summary keeps: {"step", "why", "changed", "judged"}, judged as "critic on outputs": agreement.
    """
    kept = dict(step=row["step"], why=why if why == "gold" else "+".join(why),
                changed=[list(c) for c in changed],
                judged={f"{c} on {o}": round(value, 4) for (c, o), value in judged.items()})
    if run.first:
        (run.out_dir / "hacks").mkdir(exist_ok=True)
        name = f"{run.last_report() + 1:03d}"
        draw_report(run.out_dir, row, run.out_dir / f"hacks/{name}.png")
        page = report_page(name, row, why, changed, judged, texts, encoding)
        run.write(f"hacks/{name}.md", lambda f: f.write(page.encode()))
    return kept


def report_page(name, row, why, changed, judged, texts, encoding):
    """The page of `write_report`, markdown."""
    cause = "gold rose" if why == "gold" else "the watch alarmed on " + ", ".join(why)
    order = [f"{i}. {stream}, from step {since}" for i, (since, stream) in enumerate(changed, 1)]
    judges = [f"| {whose} critic | {judged[c, 'then']:.3f} | {judged[c, 'now']:.3f} |"
              for whose, c in (("snapshot's", "then"), ("today's", "now"))]
    numbers = [f"| {column} | {value:.4g} |" for column, value in row.items() if isinstance(value, float)]
    show = lambda when: [f"{what:<12} {marked(encoding, ids, texts[when][1])}"
                         for what, ids in zip(("output", "observation", "target"), texts[when])]
    return "\n".join((
        f"# {row['arm']}, step {row['step']}: {cause}", "\n## What changed first\n",
        *(order or ["No stream has left its usual range."]), f"\n![curves]({name}.png)",
        "\n## Drift or exploit?\n\nShare of targets that equal the observation:\n",
        "| | on the snapshot's outputs | on today's |\n|---|---|---|", *judges, "\n" + verdict(judged),
        "\n## The texts\n\nWhat differs from the observation stands in ⟦ ⟧; ⏎ is a line break.",
        "\n**before: the snapshot**\n\n```", *show("then"), "```\n\n**now**\n\n```", *show("now"),
        "```\n\n## The row of the log\n\n| | |\n|---|---|", *numbers, ""))
