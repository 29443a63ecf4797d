//! What ranks store of a matrix, one after the other, joined byte by byte here: the bytes of the whole, under every scheme.
#![allow(clippy::unwrap_used, reason = "tests")]
mod common;
use common::noise;
use graphs::{DType, Format, Weight};
use proptest::prelude::*;
use quant::{MemorySource, Stored, clip, materialize, materialize_f32};

/// A matrix that divides by the ranks along both axes, and how it becomes integers.
#[derive(Clone, Debug)]
struct Case {
    ranks: usize,
    out: usize,
    input: usize,
    format: Format,
    compute: DType,
    /// AWQ and SmoothQuant: factors of columns, and rows that take back those of the layer behind.
    scaled: bool,
    searched: Search,
    seed: u64,
}

/// What the scales come from.
#[derive(Clone, Copy, Debug)]
enum Search {
    /// The largest magnitudes.
    None,
    /// The weights.
    Mse,
    /// Products with sampled inputs.
    Outputs,
}

impl Case {
    fn source(&self) -> MemorySource {
        let mut source = MemorySource::default();
        let mut insert = |name: &str, shape: &[usize], values: &[f32]| {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            source.insert(name, DType::Float32, shape, bytes);
        };
        insert("w", &[self.out, self.input], &noise(self.out * self.input, self.seed));
        for (name, count) in [("rows", self.out), ("columns", self.input)] {
            let factors: Vec<f32> = noise(count, self.seed ^ 7).into_iter().map(|value| value.abs() + 0.1).collect();
            insert(name, &[count], &factors);
        }
        let inputs = match self.searched {
            Search::None => return source,
            Search::Mse => Vec::new(),
            Search::Outputs => noise(5 * self.input, self.seed ^ 9),
        };
        let weights = materialize_f32(&self.before(), &source, DType::Float32).unwrap();
        let scales = clip(&weights, self.input, &inputs, self.format, self.compute);
        let bytes = scales.iter().flat_map(|value| value.to_le_bytes()).collect();
        source.insert("scales", DType::Float32, &self.format.scale_shape(self.out, self.input), bytes);
        source
    }

    /// What is rounded.
    fn before(&self) -> Weight {
        let weight = Weight::tensor("w", &[self.out, self.input]);
        if !self.scaled {
            return weight;
        }
        let scaled = |axis, by, divide, of| Weight::Scaled { axis, by: Box::new(by), divide, of: Box::new(of) };
        let rows = scaled(0, Weight::tensor("rows", &[self.out]), true, weight);
        scaled(1, Weight::tensor("columns", &[self.input]), false, rows)
    }

    fn weight(&self) -> Weight {
        let scales = Weight::tensor("scales", &self.format.scale_shape(self.out, self.input));
        let scales = (!matches!(self.searched, Search::None)).then(|| Box::new(scales));
        Weight::Packed { format: self.format, scales, of: Box::new(self.before()) }
    }

    fn group(&self) -> usize {
        match self.format {
            Format::Int8 => self.input,
            Format::Int4 { group } => group,
        }
    }

    /// Each rank's part along an axis, made without the others.
    fn parts(&self, axis: usize) -> Vec<Stored> {
        let (source, size) = (self.source(), [self.out, self.input][axis] / self.ranks);
        let part = |rank: usize| {
            let (start, end, of) = (rank * size, (rank + 1) * size, Box::new(self.weight()));
            materialize(&Weight::Slice { axis, start, end, of }, &source, self.compute).unwrap()
        };
        (0..self.ranks).map(part).collect()
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (1usize..=8, 1usize..12, 1usize..9, 0usize..12);
    let int4 = any::<bool>();
    let compute = prop::sample::select(vec![DType::Float16, DType::Bfloat16, DType::Float32]);
    let searched = prop::sample::select(vec![Search::None, Search::Mse, Search::Outputs]);
    (sizes, int4, compute, any::<bool>(), searched, any::<u64>()).prop_map(
        |((ranks, outputs, unit, pick), int4, compute, scaled, searched, seed)| {
            // Some groups for each rank, or some ranks for each group: for all of them with one scale per channel.
            let divisors: Vec<usize> = (1..=ranks).filter(|groups| ranks % groups == 0).collect();
            let groups = if pick < 4 { ranks * (pick + 1) } else { divisors[pick % divisors.len()] };
            let input = groups.max(ranks) * unit;
            let format = if int4 { Format::Int4 { group: input / groups } } else { Format::Int8 };
            let out = ranks * outputs * if int4 { 2 } else { 1 };
            Case { ranks, out, input, format, compute, scaled, searched, seed }
        },
    )
}

/// The lines of equal length of each rank, side by side.
fn beside(parts: &[&[u8]], lines: usize) -> Vec<u8> {
    let line = |at: usize| parts.iter().flat_map(move |part| part.chunks(part.len() / lines).nth(at).unwrap());
    (0..lines).flat_map(line).copied().collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn parts_of_outputs_side_by_side_are_the_whole(case in cases()) {
        let (whole, parts) = (materialize(&case.weight(), &case.source(), case.compute).unwrap(), case.parts(0));
        let bytes: Vec<&[u8]> = parts.iter().map(|part| &part.bytes[..]).collect();
        let scales: Vec<&[u8]> = parts.iter().map(|part| &part.scale.as_ref().unwrap().bytes[..]).collect();
        prop_assert_eq!(&beside(&bytes, case.input), &whole.bytes);
        prop_assert_eq!(&beside(&scales, case.input / case.group()), &whole.scale.unwrap().bytes);
    }

    #[test]
    fn parts_of_inputs_one_below_the_other_are_the_whole(case in cases()) {
        let (whole, parts) = (materialize(&case.weight(), &case.source(), case.compute).unwrap(), case.parts(1));
        let bytes: Vec<u8> = parts.iter().flat_map(|part| part.bytes.clone()).collect();
        prop_assert_eq!(&bytes, &whole.bytes);
        // Ranks that share a group have its scales each.
        let sharing = (case.ranks * case.group() / case.input).max(1);
        let scales = parts.iter().map(|part| &part.scale.as_ref().unwrap().bytes);
        let first: Vec<u8> = scales.clone().step_by(sharing).flatten().copied().collect();
        prop_assert_eq!(&first, &whole.scale.unwrap().bytes);
        let scales: Vec<&Vec<u8>> = scales.collect();
        prop_assert!(scales.chunks(sharing).all(|ranks| ranks.iter().all(|own| *own == ranks[0])));
    }
}
