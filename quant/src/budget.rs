//! Which of its options each unit takes, so that all of them together lose little and cost no more than a budget.
//!
//! The options of a unit that can be worth their cost lie on the lower convex hull of loss over cost: a Lagrangian
//! multiplier picks one of these for each unit. All steps along all hulls are taken in the order of what they win for a
//! bit; a step that does not fit any more ends its unit's way, and cheaper ones of other units fill what is left. So the
//! result loses at most one step more than the best there is, and a larger budget never loses more.
use std::cmp::Ordering;

/// What a unit may take: bits, and what it then loses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Price {
    pub cost: u64,
    pub loss: f64,
}

/// From one option of a unit to the next of its hull.
struct Step {
    unit: usize,
    to: usize,
    cost: u64,
    gain: f64,
}

/// The number of the option for each unit; `None` where not even the cheapest fit together. The first of equals wins, so
/// that the result is one and the same always.
pub fn allot(units: &[Vec<Price>], budget: u64) -> Option<Vec<usize>> {
    let hulls: Vec<Vec<usize>> = units.iter().map(|options| hull(options)).collect();
    let mut chosen = hulls.iter().map(|hull| hull.first().copied()).collect::<Option<Vec<usize>>>()?;
    let spent: u64 = std::iter::zip(units, &chosen).map(|(options, option)| options[*option].cost).sum();
    let mut left = budget.checked_sub(spent)?;
    let mut steps: Vec<Step> = Vec::new();
    for (unit, (options, hull)) in std::iter::zip(units, &hulls).enumerate() {
        steps.extend(hull.windows(2).map(|pair| {
            let (from, to) = (options[pair[0]], options[pair[1]]);
            Step { unit, to: pair[1], cost: to.cost - from.cost, gain: from.loss - to.loss }
        }));
    }
    // Stable: equal steps stay in the order of units, and those of one unit in the order of its hull.
    steps.sort_by(|a, b| rate(b).total_cmp(&rate(a)));
    let mut ended = vec![false; units.len()];
    for step in steps {
        if ended[step.unit] {
            continue;
        }
        match left.checked_sub(step.cost) {
            Some(rest) => (left, chosen[step.unit]) = (rest, step.to),
            None => ended[step.unit] = true,
        }
    }
    Some(chosen)
}

fn rate(step: &Step) -> f64 {
    step.gain / step.cost as f64
}

/// Options of the lower convex hull from the cheapest on, each dearer and better than the one before.
fn hull(options: &[Price]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..options.len()).filter(|at| !options[*at].loss.is_nan()).collect();
    let cheaper = |a: &usize, b: &usize| -> Ordering {
        let (a, b) = (options[*a], options[*b]);
        a.cost.cmp(&b.cost).then(a.loss.total_cmp(&b.loss))
    };
    order.sort_by(cheaper);
    let slope = |from: usize, to: usize| {
        (options[from].loss - options[to].loss) / (options[to].cost - options[from].cost) as f64
    };
    let mut hull: Vec<usize> = Vec::new();
    for at in order {
        if hull.last().is_some_and(|last| options[at].loss >= options[*last].loss) {
            continue;
        }
        while let [.., before, last] = hull[..]
            && slope(before, last) <= slope(last, at)
        {
            hull.pop();
        }
        hull.push(at);
    }
    hull
}
