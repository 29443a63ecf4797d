//! Scales below those of the largest magnitudes: a few weights are clipped so that the others are rounded more finely.
//! Where rows of inputs are known the products count, as in AWQ's clipping (Lin et al. 2023, arXiv 2306.00978), else the
//! weights themselves (least squares).
//!
//! A group of weights that are off by d loses |X d|^2 = d G d for G = X^T X over the group's inputs. AWQ chooses each group
//! alone; here a group is then chosen again against what the others leave, r = X d over all of them: |r + X d|^2 =
//! |r|^2 + 2 r X d + d G d, until nothing changes or a few times.
use crate::round;
use crate::rounded::{BLOCK, group_of, round_by};
use graphs::interpret::multiply;
use graphs::{DType, Format};
use rayon::prelude::*;
use std::ops::Range;

/// Parts of the largest magnitude that are tried, from all of it down.
const STEPS: usize = 10;
const STEP: f32 = 1.0 / 20.0;

/// Parts that are compared by the products, the best of all by [`Outline`]: with all of them it takes half as long again,
/// with four the trained LLaVA's mean divergence is twice as large.
const KEPT: usize = 6;

/// Times that each group is chosen again, at most: nearly all outputs are settled then (twice as many take half as long again).
const ROUNDS: usize = 4;

/// The scales that lose least, in the format's own order, of a matrix `[out, in]`. `rows` are inputs `[.., in]`, none for
/// least squares.
pub fn clip(weights: &[f32], input: usize, rows: &[f32], format: Format, compute: DType) -> Vec<f32> {
    let (group, outputs) = (group_of(format, input).max(1), weights.len() / input.max(1));
    let groups = input / group;
    let known: Vec<Inputs> =
        (0..groups).into_par_iter().map(|index| Inputs::new(rows, input, index * group, group)).collect();
    let mut found = vec![1.0; outputs * groups];
    found.par_chunks_mut((BLOCK * groups).max(1)).enumerate().for_each(|(block, found)| {
        let outputs = found.len() / groups;
        let whole = &weights[block * BLOCK * input..][..outputs * input];
        let of = |index: usize| -> Vec<f32> {
            whole.chunks_exact(input).flat_map(|row| &row[index * group..(index + 1) * group]).copied().collect()
        };
        let mut parts: Vec<Part> = std::iter::zip(0..groups, &known)
            .map(|(index, inputs)| Part::new(&of(index), inputs, format.limit(), compute))
            .collect();
        if !rows.is_empty() && groups > 1 {
            together(&mut parts, &known, outputs);
        }
        for (index, part) in parts.iter().enumerate() {
            found.iter_mut().skip(index).step_by(groups).zip(part.scales()).for_each(|(into, scale)| *into = scale);
        }
    });
    match format {
        Format::Int8 => found,
        // Stored by group, then by output.
        Format::Int4 { .. } => {
            (0..groups).flat_map(|index| found.iter().skip(index).step_by(groups).copied()).collect()
        }
    }
}

/// Chooses each group against what the others leave. Outputs do not touch each other: those of which a round changed nothing
/// are done.
fn together(parts: &mut [Part], known: &[Inputs], outputs: usize) {
    let count = known.first().map_or(0, |inputs| inputs.count);
    let mut left = vec![0.0f32; outputs * count];
    let mut open: Vec<usize> = (0..outputs).collect();
    for (part, inputs) in std::iter::zip(&*parts, known) {
        let off: Vec<f32> = open.iter().flat_map(|&output| part.off(output, part.chosen[output])).copied().collect();
        add(&mut left, &multiply(&off, &inputs.rows, [outputs, inputs.group, count], true, false), 1.0);
    }
    for _ in 0..ROUNDS {
        let mut changed = vec![false; open.len()];
        for (part, inputs) in std::iter::zip(&mut *parts, known) {
            let mut against = multiply(&left, &inputs.rows, [open.len(), count, inputs.group], false, false);
            // By how much those that change are less off than before.
            let (mut places, mut less) = (Vec::new(), Vec::new());
            for ((place, &output), against) in open.iter().enumerate().zip(against.chunks_exact_mut(inputs.group)) {
                let before = part.chosen[output];
                if part.choose(output, against) {
                    places.push(place);
                    let (old, new) = (part.off(output, before), part.off(output, part.chosen[output]));
                    less.extend(std::iter::zip(old, new).map(|(old, new)| old - new));
                }
            }
            let less = multiply(&less, &inputs.rows, [places.len(), inputs.group, count], true, false);
            for (place, less) in std::iter::zip(places, less.chunks_exact(count.max(1))) {
                add(&mut left[place * count..][..count], less, -1.0);
                changed[place] = true;
            }
        }
        let rows = std::iter::zip(&changed, left.chunks_exact(count.max(1)));
        left = rows.filter(|(changed, _)| **changed).flat_map(|(_, row)| row).copied().collect();
        open = std::iter::zip(open, changed).filter_map(|(output, changed)| changed.then_some(output)).collect();
        if open.is_empty() {
            break;
        }
    }
}

fn add(to: &mut [f32], values: &[f32], sign: f32) {
    std::iter::zip(to, values).for_each(|(to, value)| *to += sign * value);
}

/// The inputs of one group.
struct Inputs {
    group: usize,
    /// `[count, group]`
    rows: Vec<f32>,
    count: usize,
    /// X^T X; empty where the group is wider than the rows are many, and products with these are less work.
    gram: Vec<f32>,
    outline: Outline,
}

impl Inputs {
    fn new(rows: &[f32], input: usize, first: usize, group: usize) -> Inputs {
        let count = rows.len() / input.max(1);
        let own: Vec<f32> =
            rows.chunks_exact(input.max(1)).flat_map(|row| &row[first..first + group]).copied().collect();
        let mut gram = Vec::new();
        if group <= count {
            let columns: Vec<f32> = (0..group).flat_map(|at| own.iter().skip(at).step_by(group).copied()).collect();
            gram = multiply(&columns, &columns, [group, count, group], true, false);
        }
        let outline = Outline::new(&own, group, count);
        Inputs { group, rows: own, count, gram, outline }
    }

    /// `off` `[.., group]` times X^T X.
    fn weigh(&self, off: &[f32]) -> Vec<f32> {
        let (group, count, number) = (self.group, self.count, off.len() / self.group);
        if group <= count {
            return multiply(off, &self.gram, [number, group, group], false, false);
        }
        let products = multiply(off, &self.rows, [number, group, count], true, false);
        multiply(&products, &self.rows, [number, count, group], false, false)
    }
}

/// X^T X by few numbers: inputs are taken to vary around their mean each by itself. Without rows all weights count the same.
struct Outline {
    count: f32,
    mean: Vec<f32>,
    /// Sums of squares around the mean.
    around: Vec<f32>,
}

impl Outline {
    fn new(rows: &[f32], group: usize, count: usize) -> Outline {
        let mut mean = vec![0.0f32; group];
        let mut around = vec![if count == 0 { 1.0 } else { 0.0f32 }; group];
        rows.chunks_exact(group).for_each(|row| add(&mut mean, row, 1.0 / count as f32));
        for row in rows.chunks_exact(group) {
            for ((around, mean), value) in around.iter_mut().zip(&mean).zip(row) {
                *around += (value - mean).powi(2);
            }
        }
        Outline { count: count as f32, mean, around }
    }

    fn loss(&self, off: &[f32]) -> f64 {
        f64::from(self.count) * dot(off, &self.mean).powi(2) + sum(off, &self.around, |off, around| off * off * around)
    }
}

/// One group of some outputs' weights, and the steps that are left of each to choose from, largest scales first.
struct Part {
    group: usize,
    /// Steps of an output.
    kept: usize,
    /// `[outputs, kept]`: the scale of each step, and what it loses without regard to other groups.
    scales: Vec<f32>,
    own: Vec<f64>,
    /// By how much weights are off, `[outputs, kept, group]`, and that times X^T X, empty without rows.
    off: Vec<f32>,
    weighed: Vec<f32>,
    /// The step of each output.
    chosen: Vec<usize>,
}

impl Part {
    /// `weights` are `[outputs, group]`; for each output the step is chosen that loses least, the largest scale of equals.
    fn new(weights: &[f32], inputs: &Inputs, limit: f32, compute: DType) -> Part {
        let group = inputs.group;
        // Without rows the outline is all there is.
        let kept = if inputs.rows.is_empty() { 1 } else { KEPT };
        let (mut scales, mut own, mut off) = (Vec::new(), Vec::new(), Vec::new());
        let mut tried = vec![0.0f32; STEPS * group];
        for row in weights.chunks_exact(group) {
            let most = row.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            let scale = |step: usize| round::scale(most * (1.0 - step as f32 * STEP), limit, compute);
            let mut losses = [0.0f64; STEPS];
            for (step, off) in tried.chunks_exact_mut(group).enumerate() {
                off.copy_from_slice(row);
                round_by(off, scale(step), limit);
                std::iter::zip(&mut *off, row).for_each(|(off, value)| *off = value - *off);
                losses[step] = inputs.outline.loss(off);
            }
            let mut steps: [usize; STEPS] = std::array::from_fn(|step| step);
            steps.sort_by(|a, b| losses[*a].total_cmp(&losses[*b]));
            steps[..kept].sort_unstable();
            for &step in &steps[..kept] {
                scales.push(scale(step));
                own.push(losses[step]);
                off.extend_from_slice(&tried[step * group..][..group]);
            }
        }
        let mut weighed = Vec::new();
        if !inputs.rows.is_empty() {
            weighed = inputs.weigh(&off);
            own =
                std::iter::zip(off.chunks_exact(group), weighed.chunks_exact(group)).map(|(a, b)| dot(a, b)).collect();
        }
        let chosen = own.chunks_exact(kept).map(|losses| least(losses.iter().copied())).collect();
        Part { group, kept, scales, own, off, weighed, chosen }
    }

    fn scales(&self) -> impl Iterator<Item = f32> {
        self.chosen.iter().enumerate().map(|(output, step)| self.scales[output * self.kept + step])
    }

    /// Where one of an output's steps is in `off` and `weighed`.
    fn place(&self, output: usize, step: usize) -> Range<usize> {
        let start = (output * self.kept + step) * self.group;
        start..start + self.group
    }

    /// What an output's weights are off by in one of its steps.
    fn off(&self, output: usize, step: usize) -> &[f32] {
        &self.off[self.place(output, step)]
    }

    /// Chooses an output's step again, where `against` is X^T r for the r that all groups leave; whether it is another.
    fn choose(&mut self, output: usize, against: &mut [f32]) -> bool {
        let before = self.chosen[output];
        // Of r this group's own part is X d.
        add(against, &self.weighed[self.place(output, before)], -1.0);
        let loss = |step| self.own[output * self.kept + step] + 2.0 * dot(self.off(output, step), against);
        let best = least((0..self.kept).map(loss));
        self.chosen[output] = best;
        best != before
    }
}

/// The place of the least, the first of equals.
fn least(values: impl Iterator<Item = f64>) -> usize {
    let better = |best: (usize, f64), (at, value)| if value < best.1 { (at, value) } else { best };
    values.enumerate().fold((0, f64::INFINITY), better).0
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    sum(a, b, |a, b| a * b)
}

/// Of what two values at a place give: in sums side by side, which the processor adds at once.
fn sum(a: &[f32], b: &[f32], of: impl Fn(f32, f32) -> f32) -> f64 {
    const SUMS: usize = 8;
    let mut sums = [0.0f64; SUMS];
    let (wide_a, wide_b) = (a.chunks_exact(SUMS), b.chunks_exact(SUMS));
    let rest = std::iter::zip(wide_a.remainder(), wide_b.remainder()).map(|(a, b)| f64::from(of(*a, *b))).sum::<f64>();
    for (a, b) in std::iter::zip(wide_a, wide_b) {
        (0..SUMS).for_each(|at| sums[at] += f64::from(of(a[at], b[at])));
    }
    sums.iter().sum::<f64>() + rest
}
