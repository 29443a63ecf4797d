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

/// Parts of the largest magnitude that are tried, from all of it down.
const STEPS: usize = 10;
const STEP: f32 = 1.0 / 20.0;

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
        let mut parts: Vec<Part> =
            (0..groups).map(|index| Part::new(of(index), group, format.limit(), compute)).collect();
        std::iter::zip(&mut parts, &known).for_each(|(part, inputs)| {
            part.choose(inputs, None);
        });
        if !rows.is_empty() && groups > 1 {
            together(&mut parts, &known, outputs);
        }
        for (index, part) in parts.iter().enumerate() {
            found.iter_mut().skip(index).step_by(groups).zip(&part.scales).for_each(|(into, scale)| *into = *scale);
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

/// Chooses each group against what the others leave.
fn together(parts: &mut [Part], known: &[Inputs], outputs: usize) {
    let count = known.first().map_or(0, |inputs| inputs.count);
    let mut left = vec![0.0f32; outputs * count];
    let add = |left: &mut [f32], products: &[f32], sign: f32| {
        std::iter::zip(left, products).for_each(|(left, product)| *left += sign * product);
    };
    for (part, inputs) in std::iter::zip(&*parts, known) {
        add(&mut left, &multiply(&part.off, &inputs.rows, [outputs, part.group, count], true, false), 1.0);
    }
    for _ in 0..ROUNDS {
        let mut settled = true;
        for (part, inputs) in std::iter::zip(&mut *parts, known) {
            // X^T (r + X d) without the group's own X d.
            let mut against = multiply(&left, &inputs.rows, [outputs, count, part.group], false, false);
            add(&mut against, &part.weighed(inputs), -1.0);
            let mut before = part.off.clone();
            let changed = part.choose(inputs, Some(&against));
            if changed.is_empty() {
                continue;
            }
            settled = false;
            // Of those that changed, by how much they are less off than before.
            let rows = |output: &usize| output * part.group..(output + 1) * part.group;
            add(&mut before, &part.off, -1.0);
            let less: Vec<f32> = changed.iter().flat_map(|output| &before[rows(output)]).copied().collect();
            let less = multiply(&less, &inputs.rows, [changed.len(), part.group, count], true, false);
            for (output, less) in std::iter::zip(changed, less.chunks_exact(count.max(1))) {
                add(&mut left[output * count..][..count], less, -1.0);
            }
        }
        if settled {
            break;
        }
    }
}

/// The inputs of one group.
struct Inputs {
    /// `[count, group]`
    rows: Vec<f32>,
    count: usize,
    /// X^T X; empty without rows.
    gram: Vec<f32>,
}

impl Inputs {
    fn new(rows: &[f32], input: usize, first: usize, group: usize) -> Inputs {
        let count = rows.len() / input.max(1);
        let own: Vec<f32> =
            rows.chunks_exact(input.max(1)).flat_map(|row| &row[first..first + group]).copied().collect();
        let columns: Vec<f32> = (0..group).flat_map(|at| own.iter().skip(at).step_by(group).copied()).collect();
        let gram =
            if own.is_empty() { Vec::new() } else { multiply(&columns, &columns, [group, count, group], true, false) };
        Inputs { rows: own, count, gram }
    }
}

/// One group of some outputs' weights, `[outputs, group]`.
struct Part {
    weights: Vec<f32>,
    group: usize,
    limit: f32,
    compute: DType,
    /// What was chosen, and by how much weights are off then.
    scales: Vec<f32>,
    off: Vec<f32>,
    /// What each step loses by itself, for each output, once that is known: products that no round changes.
    own: Vec<f64>,
}

impl Part {
    fn new(weights: Vec<f32>, group: usize, limit: f32, compute: DType) -> Part {
        let (scales, off) = (vec![1.0; weights.len() / group], vec![0.0; weights.len()]);
        Part { weights, group, limit, compute, scales, off, own: Vec::new() }
    }

    /// d G for each output.
    fn weighed(&self, inputs: &Inputs) -> Vec<f32> {
        multiply(&self.off, &inputs.gram, [self.scales.len(), self.group, self.group], false, false)
    }

    /// Chooses for each output the scale that loses least, the largest of equals; `against` is X^T r. Gives the outputs whose
    /// choice changed.
    fn choose(&mut self, inputs: &Inputs, against: Option<&[f32]>) -> Vec<usize> {
        let (group, outputs) = (self.group, self.scales.len());
        let mut best = vec![f64::INFINITY; outputs];
        let before = std::mem::take(&mut self.scales);
        self.scales = before.clone();
        let mut off = vec![0.0; self.weights.len()];
        let rows = || self.weights.chunks_exact(group);
        let most: Vec<f32> = rows().map(|row| row.iter().fold(0.0, |most: f32, value| most.max(value.abs()))).collect();
        for step in 0..STEPS {
            let part = 1.0 - step as f32 * STEP;
            let mut scales = Vec::with_capacity(outputs);
            for ((row, most), off) in rows().zip(&most).zip(off.chunks_exact_mut(group)) {
                let scale = round::scale(most * part, self.limit, self.compute);
                off.copy_from_slice(row);
                round_by(off, scale, self.limit);
                std::iter::zip(&mut *off, row).for_each(|(off, value)| *off = value - *off);
                scales.push(scale);
            }
            if self.own.len() == step * outputs {
                let weighed = (!inputs.gram.is_empty())
                    .then(|| multiply(&off, &inputs.gram, [outputs, group, group], false, false));
                let weighed = weighed.as_deref().unwrap_or(&off);
                let rows = std::iter::zip(off.chunks_exact(group), weighed.chunks_exact(group));
                self.own.extend(rows.map(|(off, weighed)| dot(off, weighed)));
            }
            for (output, (best, scale)) in std::iter::zip(&mut best, scales).enumerate() {
                let place = output * group..(output + 1) * group;
                let against = against.map_or(0.0, |against| 2.0 * dot(&off[place.clone()], &against[place.clone()]));
                let loss = self.own[step * outputs + output] + against;
                if loss < *best {
                    (*best, self.scales[output]) = (loss, scale);
                    self.off[place.clone()].copy_from_slice(&off[place]);
                }
            }
        }
        (0..outputs).filter(|&output| self.scales[output] != before[output]).collect()
    }
}

/// In sums side by side, which the processor adds at once.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    const SUMS: usize = 8;
    let mut sums = [0.0f64; SUMS];
    let (wide_a, wide_b) = (a.chunks_exact(SUMS), b.chunks_exact(SUMS));
    let rest = std::iter::zip(wide_a.remainder(), wide_b.remainder()).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    for (a, b) in std::iter::zip(wide_a, wide_b) {
        (0..SUMS).for_each(|at| sums[at] += f64::from(a[at] * b[at]));
    }
    sums.iter().sum::<f64>() + rest
}
