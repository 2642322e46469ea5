"""``linear``: one h x h map behind the MLP before each gap, folded into its down projection."""

from __future__ import annotations

from typing import Any

import torch

from sglp_deploy.evidence.branches import as_stored, weight_of
from sglp_deploy.evidence.least_squares import NormalEquations, best_ridge
from sglp_deploy.repairs.options import LinearOptions
from sglp_deploy.repairs.refit import RIDGES, Site
from sglp_deploy.repairs.seam import Fitted
from sglp_deploy.repairs.workbench import Workbench


class Linear:
    """With M the MLP's output, r the stream in front of it and h the unpruned stream behind the gap:

        T = argmin  sum over tokens of |M T - (h - r)|^2 / |h|^2  +  ridge * mean(M^2) * |T - I|^2

    The down projection then is ``T' W`` (and its bias ``T' b``): nothing is added to the model.  It can express less
    than ``refit`` and is here for comparison.

    Source: ReplaceMe, arXiv:2505.02819 (least-squares variant).  Ours: gaps anywhere, each fitted on the pruned model's
    own stream; padding left out; each token's error relative to its size.
    """

    name = "linear"
    source = "ReplaceMe, arXiv:2505.02819"
    Options = LinearOptions

    def fit(self, bench: Workbench, options: LinearOptions) -> Fitted:
        """See :class:`sglp_deploy.repairs.seam.Repair`."""
        behind = bench.dense([gap.behind for gap in bench.gaps])
        stream, at = None, 0
        fits: list[dict[str, Any]] = []
        not_done: list[str] = []
        for gap in bench.gaps:
            stream, at = bench.drifted(stream, at, gap.before), gap.before
            site = Site(bench, gap.before, stream, behind[gap.behind])
            attention, mlp = bench.branches(gap.before)
            if mlp.projection is None or mlp.norm is not None:
                not_done.append(f"layer {bench.kept[gap.before]}, {mlp.path}: a map behind it cannot be folded")
                continue
            before = site.distance()
            projection = site.module.get_submodule(mlp.projection)
            width = weight_of(projection).shape[0]
            identity = torch.eye(width, dtype=torch.float64, device=weight_of(projection).device)
            sums = []
            for indices in (tuple(bench.fitted_on()), bench.held_out):
                equations = NormalEquations(width, width, device=identity.device)
                for rows in site.rows(indices, [mlp.projection, attention.path]):
                    wanted = (rows.target - rows.given) / mlp.scale - rows.out[attention.path].float()
                    equations.add(rows.out[mlp.projection].float(), wanted, rows.relative)
                sums.append(equations)
            turned, _, _ = best_ridge(sums[0], sums[1], identity, RIDGES if options.ridge is None else (options.ridge,))
            folded = turned.T @ weight_of(projection).detach().double()
            bench.put(gap.before, f"{mlp.projection}.weight", as_stored(projection, folded))
            bias = projection._parameters.get("bias")
            if bias is not None:
                bench.put(gap.before, f"{mlp.projection}.bias", turned.T @ bias.detach().double())
            fits.append(
                {
                    "layer": bench.kept[gap.before],
                    "behind": gap.behind,
                    "projection": mlp.projection,
                    "distance_before": before,
                    "distance_after": site.distance(),
                }
            )
        return Fitted({"fits": fits}, tuple(not_done))
