"""
How the critic of stage 3 finds classes that nobody names: results/stage-3-classes.svg, which moves.

    python studies/classes.py     # trains one on planted-synonyms: two cores, about a minute

Each of 16 meanings has four tokens, of which one is drawn at each use. A dot is the embedding of a token, of
unit length, in the two principal directions of the last E; a line leads to the mean of its class. Below,
precision: of a token's three nearest by cosine, in all dimensions, the share that is of its class.
"""
import runpy
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project's modules
import phases
from configurator import refuse_if
from planted import true_classes
from probe import share_alike

PRETRAIN, TOKENS, OUT = 30, 40_000, ROOT / "results/stage-3-classes.svg"
SETTINGS = (f"--dataset=planted-synonyms --vocab=64 --train_tokens={TOKENS} --pretrain={PRETRAIN} "
            "--meta_steps=430 --kappa=1 --inner_steps=1 --inner_length=0.05 --scalar_rate=0.03 --chunk=1 "
            "--batch_size=64 --outer_batch=256 --critic_rate=0.2 --n_layer=1 --n_head=2 --block_size=16 "
            "--learning_rate=3e-3 --warmup=10 --eval_interval=10 --arms= --out_dir=out/classes")
SECONDS, SIZE, BELOW, EDGE = 12, 360, 90, 14  # of a round; pixels of the square, below it, around it


def meta_phase():
    """(steps, [E of each], corpus) of the critic's part of a meta phase, at its evaluations."""
    found, evaluate = {}, phases.Phases.evaluate

    def keep(loop, n):
        evaluate(loop, n)
        if loop.step >= PRETRAIN:
            found[loop.step - PRETRAIN] = loop.parts["critic"]["E"].detach().clone()
        keep.corpus = loop.corpus
    phases.Phases.evaluate = keep
    sys.argv = ["meta_gist.py", *SETTINGS.split()]
    runpy.run_path(str(ROOT / "meta_gist.py"), run_name="__main__")
    return list(found), list(found.values()), keep.corpus


def animated(tag, fixed, **moving):
    """An SVG element whose attributes `moving` take these values in turn; the last stay for a quarter."""
    times = ";".join(f"{t:.3f}" for t in [*np.linspace(0, 0.75, len([*moving.values()][0])), 1])
    pace = f'dur="{SECONDS}s" repeatCount="indefinite" keyTimes="{times}"'
    told = {name: [f"{v:.1f}" for v in values] for name, values in moving.items()}
    last = " ".join(f'{name}="{v[-1]}"' for name, v in told.items())  # for what shows no animation
    moves = (f'<animate attributeName="{k}" values="{";".join(v)};{v[-1]}" {pace}/>' for k, v in told.items())
    return f"<{tag} {fixed} {last}>{''.join(moves)}</{tag}>"


def picture(steps, points, classes, shares):
    """SVG. points: [frames, V, 2], pixels; classes: int [V]; shares: the precision of each frame."""
    parts, n, bottom = [], classes.max() + 1, SIZE + BELOW
    for token, c in enumerate(classes):
        (x, y), (mx, my) = points[:, token].T.tolist(), points[:, classes == c].mean(1).T.tolist()
        hue = f"hsl({360 * c / n:.0f} 65% {(45, 62)[c % 2]}%)"
        parts += [animated("line", f'stroke="{hue}"', x1=x, y1=y, x2=mx, y2=my),
                  animated("circle", f'r="4" fill="{hue}"', cx=x, cy=y)]
    across = [EDGE + 20 + (SIZE - 2 * EDGE - 40) * step / steps[-1] for step in steps]
    up = [bottom - 26 - (BELOW - 46) * share for share in shares]
    curve = "".join(f"{x:.1f},{y:.1f} " for x, y in zip(across, up))
    parts += [f'<polyline points="{curve}" fill="none" stroke="#777"/>',
              animated("circle", 'r="4" fill="#777"', cx=across, cy=up)]
    texts = ((across[0], bottom - 8, "0"), (across[-1] - 26, bottom - 8, f"{steps[-1]} meta steps"),
             *((across[k], up[k] - 8, f"{shares[k]:.2f}") for k in (0, -1)),
             (SIZE / 2, SIZE + 8, "precision of a token's three nearest"))
    parts += [f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{what}</text>' for x, y, what in texts]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {bottom}" width="{SIZE}">'
    return f"{head}<style>text {{ font: 11px sans-serif; fill: #777 }}</style>{''.join(parts)}</svg>\n"


def main():
    if {"-h", "--help"} & set(sys.argv):
        return print(__doc__.strip())
    refuse_if(sys.argv[1:], f"{sys.argv[1:]} is not asked for: its settings stand in {__file__}")
    steps, E, corpus = meta_phase()
    classes, unit = true_classes(corpus), torch.nn.functional.normalize(torch.stack(E), dim=-1)
    often = np.bincount(corpus.train[:TOKENS], minlength=len(classes))
    shares, unit = [share_alike(e, classes, often) for e in E], unit - unit[-1].mean(0)
    flat = unit @ torch.linalg.svd(unit[-1])[2][:2].T
    low, high = flat.amin((0, 1)), flat.amax((0, 1))
    points = EDGE + (SIZE - 2 * EDGE) * (flat - low) / (high - low)  # the square, filled
    OUT.write_text(picture(steps, points, classes, shares), encoding="utf-8")
    print(f"precision {shares[0]:.3f}, then {shares[-1]:.3f}; drawn in {OUT}")


if __name__ == "__main__":
    main()
