//! Every scheme against its definition, written a second time without regard to speed, and what must never change the
//! bytes: the number of threads, and cutting before or after quantizing.
#![allow(clippy::unwrap_used, clippy::unreachable, reason = "tests")]
use graphs::{DType, Format, Weight};
use half::{bf16, f16};
use proptest::prelude::*;
use quant::{MemorySource, Stored, materialize, materialize_f32, pack, unpack};

fn encode(dtype: DType, value: f64) -> Vec<u8> {
    match dtype {
        DType::Float16 => f16::from_f64(value).to_le_bytes().to_vec(),
        DType::Bfloat16 => bf16::from_f64(value).to_le_bytes().to_vec(),
        _ => (value as f32).to_le_bytes().to_vec(),
    }
}

fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let decode = |bytes: &[u8]| match dtype {
        DType::Float16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        DType::Bfloat16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        _ => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
    };
    bytes.chunks(dtype.bytes(1)).map(decode).collect()
}

/// The next larger value of a type than a positive one.
fn above(dtype: DType, value: f64) -> f64 {
    let mut bytes = encode(dtype, value);
    bytes.resize(4, 0);
    let bytes = (u32::from_le_bytes(bytes.try_into().unwrap()) + 1).to_le_bytes();
    decode(dtype, &bytes[..dtype.bytes(1)])[0]
}

/// The definition: `q[in][out]` and `scale[group][out]` of `w[out][in]`, in f64 rounded to f32 where f32 is prescribed.
fn naive(weights: &[f64], out: usize, input: usize, group: usize, limit: f64, scale: DType) -> (Vec<i8>, Vec<f64>) {
    let groups = input / group;
    let (mut quantized, mut scales) = (vec![0i8; out * input], vec![0.0; groups * out]);
    for channel in 0..out {
        for index in 0..groups {
            let places = index * group..(index + 1) * group;
            let most = places.clone().map(|at| weights[channel * input + at].abs()).fold(0.0, f64::max);
            let exact = f64::from((most / limit) as f32);
            let mut step = if most == 0.0 { 1.0 } else { decode(scale, &encode(scale, exact))[0] };
            if step * (limit + 0.5) < most {
                step = above(scale, step);
            }
            scales[index * out + channel] = step;
            for at in places {
                let quotient = f64::from((weights[channel * input + at] / step) as f32);
                quantized[at * out + channel] = quotient.round_ties_even().clamp(-limit - 1.0, limit) as i8;
            }
        }
    }
    (quantized, scales)
}

#[derive(Clone, Debug)]
struct Case {
    out: usize,
    input: usize,
    format: Format,
    dtype: DType,
    compute: DType,
    /// Of the spread of the weights: fp16 scales become subnormal and zero at the low end.
    exponent: i32,
    seed: u64,
}

impl Case {
    fn source(&self) -> (MemorySource, Vec<f64>) {
        let mut state = self.seed | 1;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state >> 8
        };
        let mut bytes = Vec::new();
        for at in 0..self.out * self.input {
            let value = match random() % 16 {
                0 => 0.0,
                // Short mantissas make ties.
                1..6 => (random() % 33) as f64 - 16.0,
                _ => (random() % (1 << 20)) as f64 / f64::from(1 << 15) - 16.0,
            };
            // Runs of zeros make zero groups and channels.
            let value = if at / 50 % 5 == 0 { 0.0 } else { value };
            bytes.extend(encode(self.dtype, value * f64::from(self.exponent).exp2()));
        }
        let values = decode(self.dtype, &bytes);
        let mut source = MemorySource::default();
        source.insert("w", self.dtype, &[self.out, self.input], bytes);
        (source, values)
    }

    fn weight(&self) -> Weight {
        packed(self.format, Weight::tensor("w", &[self.out, self.input]))
    }

    fn group(&self) -> usize {
        match self.format {
            Format::Int8 => self.input,
            Format::Int4 { group } => group,
        }
    }
}

fn packed(format: Format, of: Weight) -> Weight {
    of.packed(format)
}

fn slice(axis: usize, start: usize, end: usize, of: Weight) -> Weight {
    Weight::Slice { axis, start, end, of: Box::new(of) }
}

fn scale(stored: &Stored) -> &Stored {
    stored.scale.as_deref().unwrap()
}

fn cases() -> impl Strategy<Value = Case> {
    let int8 = (1usize..400, 1usize..300).prop_map(|(out, input)| (out, input, Format::Int8));
    let int4 = (1usize..260, 1usize..40, 1usize..12)
        .prop_map(|(pairs, group, groups)| (2 * pairs, group * groups, Format::Int4 { group }));
    let floats = || prop::sample::select(vec![DType::Float16, DType::Bfloat16, DType::Float32]);
    (prop_oneof![int8, int4], floats(), floats(), -24..4, any::<u64>()).prop_map(
        |(shape, dtype, compute, exponent, seed)| {
            let (out, input, format) = shape;
            Case { out, input, format, dtype, compute, exponent, seed }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_scheme_is_its_definition(case in cases()) {
        let (source, values) = case.source();
        let stored = materialize(&case.weight(), &source, case.compute).unwrap();
        let limit = f64::from(case.format.limit());
        let (quantized, scales) = naive(&values, case.out, case.input, case.group(), limit, case.compute);
        prop_assert_eq!(unpack(stored.dtype, &stored.bytes), quantized.clone());
        prop_assert_eq!(pack(stored.dtype, &quantized), stored.bytes.clone());
        prop_assert_eq!(decode(case.compute, &scale(&stored).bytes), scales.clone());
        prop_assert_eq!(&stored.shape, &[case.input, case.out]);
        prop_assert_eq!(&scale(&stored).shape, &case.format.scale_shape(case.out, case.input));

        let dequantized = materialize_f32(&case.weight(), &source, case.compute).unwrap();
        for (channel, row) in dequantized.chunks(case.input).enumerate() {
            for (at, value) in row.iter().enumerate() {
                let step = scales[at / case.group() * case.out + channel];
                let wanted = f64::from(quantized[at * case.out + channel]) * step;
                prop_assert_eq!(*value, wanted as f32);
                // At most half a step off; one that would be clamped by more has a larger scale.
                let error = (wanted - values[channel * case.input + at]).abs();
                prop_assert!(error <= step * 0.500_01, "{} {}", error, step);
            }
        }
    }

    #[test]
    fn threads_do_not_matter(case in cases()) {
        let (source, _) = case.source();
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| materialize(&case.weight(), &source, case.compute).unwrap())
        };
        let one = with(1);
        for threads in [2, 3, 7] {
            prop_assert_eq!(&with(threads), &one);
        }
    }

    #[test]
    fn shards_joined_are_the_whole(case in cases(), cut in 0.0f64..1.0, axis in 0usize..2) {
        let (source, _) = case.source();
        let weight = case.weight();
        let whole = materialize(&weight, &source, case.compute).unwrap();
        let (size, step) = match (axis, case.format) {
            (0, Format::Int8) => (case.out, 1),
            (0, _) => (case.out, 2),
            (_, Format::Int8) => (case.input, 1),
            (_, Format::Int4 { group }) => (case.input, group),
        };
        let cut = (cut * (size / step) as f64) as usize * step;
        let shards = [slice(axis, 0, cut, weight.clone()), slice(axis, cut, size, weight)];
        let joined = Weight::Concat { axis, parts: shards.to_vec() };
        prop_assert_eq!(&materialize(&joined, &source, case.compute).unwrap(), &whole);

        // The values of a shard are those of the whole at its place.
        let all = whole.to_f32();
        let second = materialize_f32(&shards[1], &source, case.compute).unwrap();
        let wanted: Vec<f32> = match axis {
            0 => all[cut * case.input..].to_vec(),
            _ => all.chunks(case.input).flat_map(|row| row[cut..].to_vec()).collect(),
        };
        prop_assert_eq!(second, wanted);
        // Cut from stored bytes, not from the checkpoint.
        let again = |start, end| materialize(&slice(axis, start, end, joined.clone()), &source, case.compute).unwrap();
        prop_assert_eq!(again(0, size), whole);
        prop_assert_eq!(again(cut, size), materialize(&shards[1], &source, case.compute).unwrap());
    }

    /// Ranks that share a group have its scale each.
    #[test]
    fn a_part_of_a_group_is_the_wholes(case in cases(), group in 0.0f64..1.0, first in 0.0f64..1.0, last in 0.0f64..1.0) {
        let (source, _) = case.source();
        let size = case.group();
        let start = (group * (case.input / size) as f64) as usize * size + (first * size as f64) as usize;
        let left = (start / size + 1) * size - start;
        let end = start + 1 + (last * left as f64) as usize;
        let part = slice(1, start, end, case.weight());
        let whole = materialize_f32(&case.weight(), &source, case.compute).unwrap();
        let wanted: Vec<f32> = whole.chunks(case.input).flat_map(|row| row[start..end].to_vec()).collect();
        prop_assert_eq!(materialize_f32(&part, &source, case.compute).unwrap(), wanted);
    }
}

#[test]
fn exact_bytes() {
    let rows = [[7.0f32, -8.0, 3.5, 0.4], [0.0, 0.0, 0.0, 0.0], [-1.0, 0.4, 0.25, -0.1], [2.5, 1.5, -7.0, 6.6]];
    let mut source = MemorySource::default();
    let bytes = rows.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    source.insert("w", DType::Float32, &[4, 4], bytes);
    let weight = Weight::tensor("w", &[4, 4]);
    let stored = materialize(&packed(Format::Int4 { group: 2 }, weight.clone()), &source, DType::Float32).unwrap();
    // Each byte holds two channels of one input, the even one low.
    assert_eq!(stored.bytes, [0x06, 0x79, 0x09, 0x43, 0x07, 0x97, 0x01, 0x7d]);
    let scales = quant::to_f32(DType::Float32, &scale(&stored).bytes);
    assert_eq!(scales, [8.0 / 7.0, 1.0, 1.0 / 7.0, 2.5 / 7.0, 0.5, 1.0, 0.25 / 7.0, 1.0]);

    let stored = materialize(&packed(Format::Int8, weight), &source, DType::Float16).unwrap();
    assert_eq!(unpack(DType::Int8, &stored.bytes[..4]), [111, 0, -127, 45]);
    let scales = [8.0 / 127.0, 1.0, 1.0 / 127.0, 7.0 / 127.0].map(|scale| f16::from_f32(scale).to_le_bytes());
    assert_eq!(scale(&stored).bytes, scales.concat());
}
