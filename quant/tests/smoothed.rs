//! Weights that smoothing scales, and scales that come from elsewhere, against their definitions.
#![allow(clippy::unwrap_used, reason = "tests")]
mod common;
use common::noise;
use graphs::{DType, Format, Weight};
use half::f16;
use proptest::prelude::*;
use quant::{MemorySource, materialize, materialize_f32, unpack};

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn scaled(axis: usize, by: &str, length: usize, divide: bool, of: Weight) -> Weight {
    Weight::Scaled { axis, by: Box::new(Weight::tensor(by, &[length])), divide, of: Box::new(of) }
}

#[derive(Clone, Debug)]
struct Case {
    out: usize,
    input: usize,
    format: Format,
    compute: DType,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let int8 = (1usize..300, 1usize..200).prop_map(|(out, input)| (out, input, Format::Int8));
    let int4 = (1usize..150, 1usize..40, 1usize..9)
        .prop_map(|(pairs, group, groups)| (2 * pairs, group * groups, Format::Int4 { group }));
    let compute = prop::sample::select(vec![DType::Float16, DType::Float32]);
    (prop_oneof![int8, int4], compute, any::<u64>()).prop_map(|((out, input, format), compute, seed)| Case {
        out,
        input,
        format,
        compute,
        seed,
    })
}

impl Case {
    fn group(&self) -> usize {
        match self.format {
            Format::Int8 => self.input,
            Format::Int4 { group } => group,
        }
    }

    fn scales(&self) -> usize {
        self.input / self.group() * self.out
    }

    /// `w`, its vectors `rows` and `columns`, and `scales` with sixteen bits' worth of precision.
    fn source(&self) -> MemorySource {
        let mut source = MemorySource::default();
        let positive = |count, seed| noise(count, seed).into_iter().map(|x| f16::from_f32(x.abs() + 0.1).to_f32());
        source.insert("w", DType::Float32, &[self.out, self.input], floats(&noise(self.out * self.input, self.seed)));
        for (name, count) in [("rows", self.out), ("columns", self.input)] {
            source.insert(name, DType::Float32, &[count], floats(&positive(count, self.seed ^ 7).collect::<Vec<_>>()));
        }
        let scales: Vec<f32> = positive(self.scales(), self.seed ^ 9).map(|x| x / 16.0).collect();
        source.insert("scales", DType::Float32, &self.format.scale_shape(self.out, self.input), floats(&scales));
        source
    }

    fn weight(&self) -> Weight {
        Weight::tensor("w", &[self.out, self.input])
    }

    fn with_scales(&self, of: Weight) -> Weight {
        let scales = Weight::tensor("scales", &self.format.scale_shape(self.out, self.input));
        Weight::Packed { format: self.format, scales: Some(Box::new(scales)), of: Box::new(of) }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_row_and_column_has_its_factor(case in cases()) {
        let source = case.source();
        let weight = scaled(1, "columns", case.input, false, scaled(0, "rows", case.out, true, case.weight()));
        let [w, rows, columns] = [("w", &[case.out, case.input][..]), ("rows", &[case.out]), ("columns", &[case.input])]
            .map(|(name, shape)| materialize_f32(&Weight::tensor(name, shape), &source, DType::Float32).unwrap());
        let wanted: Vec<f32> = w.iter().enumerate().map(|(at, w)| w / rows[at / case.input] * columns[at % case.input]).collect();
        prop_assert_eq!(materialize_f32(&weight, &source, DType::Float32).unwrap(), wanted.clone());
        // A vector's only axis, as of a norm.
        let vector = scaled(0, "rows", case.out, false, Weight::tensor("rows", &[case.out]));
        let squares: Vec<f32> = rows.iter().map(|x| x * x).collect();
        prop_assert_eq!(materialize_f32(&vector, &source, DType::Float32).unwrap(), squares);
        // Quantizing sees the product, whatever block it reads.
        let mut known = MemorySource::default();
        known.insert("w", DType::Float32, &[case.out, case.input], floats(&wanted));
        let of = |weight: Weight, source: &MemorySource| materialize(&weight.packed(case.format), source, case.compute).unwrap();
        prop_assert_eq!(of(weight, &source), of(case.weight(), &known));
    }

    #[test]
    fn given_scales_clip(case in cases()) {
        let source = case.source();
        let stored = materialize(&case.with_scales(case.weight()), &source, case.compute).unwrap();
        let scales = Weight::tensor("scales", &case.format.scale_shape(case.out, case.input));
        let scales = materialize_f32(&scales, &source, DType::Float32).unwrap();
        let w = materialize_f32(&case.weight(), &source, DType::Float32).unwrap();
        let limit = case.format.limit();
        let stored_scale = stored.scale.as_deref().unwrap();
        let held = quant::to_f32(case.compute, &stored_scale.bytes);
        for (at, (held, given)) in held.iter().zip(&scales).enumerate() {
            prop_assert!((held - given).abs() <= given * 1e-3, "{at}: {held} {given}");
        }
        for (at, found) in unpack(stored.dtype, &stored.bytes).into_iter().enumerate() {
            let (input, out) = (at / case.out, at % case.out);
            let scale = held[input / case.group() * case.out + out];
            let wanted = (w[out * case.input + input] / scale).round_ties_even().clamp(-limit - 1.0, limit);
            prop_assert_eq!(f32::from(found), wanted, "{} {}", input, out);
        }
    }

    /// What was quantized elsewhere keeps its integers: the product with its scale is divided by that scale again.
    #[test]
    fn known_integers_come_back(case in cases()) {
        let mut source = case.source();
        let scales = Weight::tensor("scales", &case.format.scale_shape(case.out, case.input));
        let scales = materialize_f32(&scales, &source, DType::Float32).unwrap();
        let limit = case.format.limit();
        let integers: Vec<f32> =
            noise(case.out * case.input, case.seed ^ 3).into_iter().map(|x| (x * (limit + 1.0)).round().min(limit)).collect();
        let product = |at: usize| integers[at] * scales[at % case.input / case.group() * case.out + at / case.input];
        let products: Vec<f32> = (0..integers.len()).map(product).collect();
        source.insert("w", DType::Float32, &[case.out, case.input], floats(&products));
        let stored = materialize(&case.with_scales(case.weight()), &source, case.compute).unwrap();
        for (at, found) in unpack(stored.dtype, &stored.bytes).into_iter().enumerate() {
            prop_assert_eq!(f32::from(found), integers[at % case.out * case.input + at / case.out]);
        }
    }

    #[test]
    fn shards_joined_are_the_whole(case in cases(), cut in 0.0f64..1.0, axis in 0usize..2) {
        let source = case.source();
        let smoothed = scaled(1, "columns", case.input, false, scaled(0, "rows", case.out, true, case.weight()));
        let (size, step) = match (axis, case.format) {
            (0, Format::Int8) => (case.out, 1),
            (0, _) => (case.out, 2),
            (_, Format::Int8) => (case.input, 1),
            (_, Format::Int4 { group }) => (case.input, group),
        };
        let cut = (cut * (size / step) as f64) as usize * step;
        for weight in [case.with_scales(smoothed.clone()), smoothed.packed(case.format)] {
            let whole = materialize(&weight, &source, case.compute).unwrap();
            let shard = |start, end| Weight::Slice { axis, start, end, of: Box::new(weight.clone()) };
            let joined = Weight::Concat { axis, parts: vec![shard(0, cut), shard(cut, size)] };
            prop_assert_eq!(&materialize(&joined, &source, case.compute).unwrap(), &whole);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case { out: 4, input: 8, format: Format::Int4 { group: 4 }, compute: DType::Float16, seed: 1 };
    let mut source = case.source();
    source.insert("ids", DType::Int32, &[8], vec![0; 32]);
    source.insert("huge", DType::Float32, &[2, 4], floats(&[1e6; 8]));
    let given = |name: &str, shape: &[usize]| Weight::Packed {
        format: case.format,
        scales: Some(Box::new(Weight::tensor(name, shape))),
        of: Box::new(case.weight()),
    };
    for (weight, wanted) in [
        (scaled(1, "rows", 4, false, case.weight()), "axis 1 of [4, 8] cannot be scaled by [4]"),
        (scaled(2, "rows", 4, false, case.weight()), "axis 2 of [4, 8] cannot be scaled by [4]"),
        (scaled(1, "ids", 8, false, case.weight()), "axis 1 of [4, 8] cannot be scaled by [8]"),
        (scaled(0, "rows", 4, false, case.weight().packed(case.format)), "quantized before it is scaled"),
        (given("columns", &[8]), "its scales are float32[8], wanted floats [2, 4]"),
        (given("none", &[2, 4]), "tensor `none` is missing"),
        (given("huge", &[2, 4]), "tensor `w` needs a scale of `1000000` at [0, 0], beyond the largest `float16`"),
    ] {
        let error = materialize(&weight, &source, case.compute).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}
