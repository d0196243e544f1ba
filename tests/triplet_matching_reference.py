"""Matching of triplets as the model does it, on its own."""

from sgtr_hf.losses.hungarian_matching import AssignmentProblem, assign_all
from sgtr_hf.losses.triplet_matching_costs import legacy_triplet_matching, triplet_matching_costs


def match_triplets(config, *arguments):
    if config.legacy_triplet_matching:
        return legacy_triplet_matching(config, *arguments)
    costs = triplet_matching_costs(config, *arguments)
    valid = arguments[-1].relation_valid
    return assign_all(AssignmentProblem(costs, valid, "num_predicate_queries"))[0]
