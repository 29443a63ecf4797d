//! Plain weight expressions against a naive evaluation, weight files, and what is refused with which words.
#![allow(clippy::unwrap_used, clippy::unreachable, reason = "tests")]
use graphs::interpret::Values;
use graphs::{DType, Format, Weight};
use half::f16;
use proptest::prelude::*;
use quant::{MemorySource, QuantError, StoredWeights, materialize, materialize_f32, store_weights};

fn slice(axis: usize, start: usize, end: usize, of: Weight) -> Weight {
    Weight::Slice { axis, start, end, of: Box::new(of) }
}

fn concat(axis: usize, parts: Vec<Weight>) -> Weight {
    Weight::Concat { axis, parts }
}

fn packed(format: Format, of: Weight) -> Weight {
    of.packed(format)
}

const INT4: Format = Format::Int4 { group: 4 };

/// Tensors `t0`, `t1`, ... of int32, each element another number.
fn numbered(shapes: &[Vec<usize>]) -> MemorySource {
    let mut source = MemorySource::default();
    for (number, shape) in shapes.iter().enumerate() {
        let count: usize = shape.iter().product();
        let bytes = (0..count as i32).flat_map(|at| (at + 1_000_000 * number as i32).to_le_bytes()).collect();
        source.insert(format!("t{number}"), DType::Int32, shape, bytes);
    }
    source
}

/// The element of an expression at an index, found from the top down.
fn element(weight: &Weight, index: &[usize]) -> i32 {
    let mut index = index.to_vec();
    match weight {
        Weight::Tensor { name, shape } => {
            let at = index.iter().zip(shape).fold(0, |at, (index, size)| at * size + index);
            at as i32 + 1_000_000 * name[1..].parse::<i32>().unwrap()
        }
        Weight::Slice { axis, start, of, .. } => {
            index[*axis] += start;
            element(of, &index)
        }
        Weight::Concat { axis, parts } => {
            let part = parts.iter().find(|part| {
                let size = part.shape()[*axis];
                let here = index[*axis] < size;
                index[*axis] -= if here { 0 } else { size };
                here
            });
            element(part.unwrap(), &index)
        }
        Weight::Packed { .. } | Weight::Scaled { .. } => unreachable!(),
    }
}

/// Slices of concatenations of slices. The last axis is long enough for runs that are read on their own.
fn expressions() -> impl Strategy<Value = (Vec<Vec<usize>>, Weight)> {
    let shape = (1usize..3, 1usize..5, prop_oneof![1usize..9, 1030usize..1100]).prop_map(|(a, b, c)| vec![a, b, c]);
    let cut = || (0.0f64..1.0, 0.0f64..1.0);
    (shape, 0usize..3, 0usize..3, cut(), cut(), 1usize..4).prop_map(|(shape, inner, outer, first, second, parts)| {
        let between = |size: usize, (a, b): (f64, f64)| {
            let (start, end) = if a < b { (a, b) } else { (b, a) };
            let start = (start * size as f64) as usize;
            (start, start.max((end * size as f64) as usize).max(start + 1))
        };
        let (start, end) = between(shape[inner], first);
        let part = |number: usize| slice(inner, start, end, Weight::tensor(format!("t{number}"), &shape));
        let joined = concat(outer, (0..parts).map(part).collect());
        let (start, end) = between(joined.shape()[outer], second);
        (vec![shape.clone(); parts], slice(outer, start, end, joined))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn plain_expressions_are_their_definition((shapes, weight) in expressions()) {
        let stored = materialize(&weight, &numbered(&shapes), DType::Float16).unwrap();
        let shape = weight.shape();
        let found: Vec<i32> = stored.bytes.chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect();
        let wanted: Vec<i32> = (0..shape.iter().product())
            .map(|at: usize| element(&weight, &[at / shape[2] / shape[1], at / shape[2] % shape[1], at % shape[2]]))
            .collect();
        prop_assert_eq!(stored.shape, shape);
        prop_assert_eq!(found, wanted);
    }
}

/// Halves `a` and `b` of [6, 8], a vector, a scalar, and damaged or unfit tensors.
fn source() -> MemorySource {
    let mut source = MemorySource::default();
    let halves = |count: usize| (0..count).map(|at| f16::from_f32(at as f32 - 20.0)).collect::<Vec<_>>();
    let bytes = |values: &[f16]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    source.insert("a", DType::Float16, &[6, 8], bytes(&halves(48)));
    source.insert("b", DType::Float16, &[6, 8], bytes(&halves(48)));
    source.insert("vector", DType::Float32, &[5], floats(&[1.0, 2.0, 3.0, 4.0, 5.0]));
    source.insert("scalar", DType::Float32, &[], floats(&[0.5]));
    source.insert("ids", DType::Int64, &[3], vec![1; 24]);
    source.insert("int", DType::Int8, &[6, 8], vec![1; 48]);
    source.insert("odd", DType::Float16, &[3, 8], bytes(&halves(24)));
    source.insert("short", DType::Float16, &[6, 8], vec![0; 10]);
    let mut damaged = halves(48);
    (damaged[21], damaged[40]) = (f16::NAN, f16::INFINITY);
    source.insert("nan", DType::Float16, &[6, 8], bytes(&damaged));
    let mut large = [1.0; 16];
    large[9] = 1e6;
    source.insert("large", DType::Float32, &[2, 8], floats(&large));
    source
}

/// Parts of the messages that only the data can cause.
const NEEDS_DATA: [&str; 4] = ["cannot be read", "wanted finite", "beyond the largest", "with different scales"];

#[test]
fn refusals_name_tensor_found_and_wanted() {
    let a = || Weight::tensor("a", &[6, 8]);
    let cases: Vec<(Weight, &str)> = vec![
        (Weight::tensor("c", &[6, 8]), "tensor `c` is missing"),
        (Weight::tensor("a", &[8, 6]), "tensor `a` has shape [6, 8], wanted [8, 6]"),
        (packed(INT4, Weight::tensor("a", &[48])), "tensor `a` has shape [6, 8], wanted [48]"),
        (
            packed(Format::Int8, Weight::tensor("int", &[6, 8])),
            "tensor `int` has dtype `int8`, wanted a float type to quantize",
        ),
        (
            packed(Format::Int8, Weight::tensor("vector", &[5])),
            "weight `vector.int8` cannot be stored: shape [5] is no matrix `[out, in]`",
        ),
        (Weight::tensor("short", &[6, 8]), "tensor `short` cannot be read: `short` has 10 bytes, wanted 96 from 0 on"),
        (
            packed(Format::Int8, Weight::tensor("nan", &[6, 8])),
            "tensor `nan` holds `NaN` at [2, 5], wanted finite weights (2 are not finite)",
        ),
        (
            packed(INT4, concat(0, vec![a(), slice(0, 2, 6, Weight::tensor("nan", &[6, 8]))])),
            "tensor `nan` holds `NaN` at [2, 5], wanted finite weights (2 are not finite)",
        ),
        (Weight::tensor("large", &[2, 8]), "tensor `large` holds `1000000` at [1, 1], beyond the largest `float16`"),
        (
            slice(1, 1, 4, Weight::tensor("large", &[2, 8])),
            "tensor `large` holds `1000000` at [1, 1], beyond the largest `float16`",
        ),
        (
            packed(INT4, Weight::tensor("large", &[2, 8])),
            "tensor `large` needs a scale of `142857.14` at [1, 0], beyond the largest `float16`",
        ),
        (packed(Format::Int4 { group: 3 }, a()), "weight `a.int4_g3` has 8 inputs, wanted a multiple of the group `3`"),
        (packed(Format::Int4 { group: 0 }, a()), "weight `a.int4_g0` has 8 inputs, wanted a multiple of the group `0`"),
        (
            packed(INT4, Weight::tensor("odd", &[3, 8])),
            "weight `odd.int4_g4` has 3 outputs, wanted an even number for int4",
        ),
        (
            slice(1, 2, 6, packed(INT4, a())),
            "weight `a.int4_g4[1:2..6]` is sliced at 2..6 along axis 1, wanted multiples of `4`",
        ),
        (
            slice(0, 1, 3, packed(INT4, a())),
            "weight `a.int4_g4[0:1..3]` is sliced at 1..3 along axis 0, wanted multiples of `2`",
        ),
        (
            slice(0, 4, 8, packed(INT4, a())),
            "weight `a.int4_g4[0:4..8]` cannot be stored: a slice of shape [6, 8] is out of bounds",
        ),
        (slice(2, 0, 1, a()), "weight `a[2:0..1]` cannot be stored: a slice of shape [6, 8] is out of bounds"),
        (slice(0, 5, 2, a()), "weight `a[0:5..2]` cannot be stored: a slice of shape [6, 8] is out of bounds"),
        (
            concat(0, vec![a(), Weight::tensor("vector", &[5])]),
            "weight `concat0(a,vector)` cannot be stored: shapes [6, 8] and [5] do not join along axis 0",
        ),
        (
            concat(0, vec![a(), Weight::tensor("int", &[6, 8])]),
            "weight `concat0(a,int)` cannot be stored: parts are `float16` and `int8`",
        ),
        (concat(0, vec![]), "weight `concat0()` cannot be stored: there are no parts"),
        (
            concat(0, vec![packed(INT4, a()), a()]),
            "weight `concat0(a.int4_g4,a)` cannot be stored: parts are `int4_g4` and `plain`",
        ),
        (
            concat(1, vec![packed(Format::Int8, slice(1, 0, 3, a())), packed(Format::Int8, slice(1, 3, 8, a()))]),
            "weight `concat1(a[1:0..3].int8,a[1:3..8].int8)` cannot be stored: int8 parts with different scales do not \
             join along their inputs: join, then quantize",
        ),
        (
            packed(INT4, packed(Format::Int8, a())),
            "weight `a.int8` cannot be stored: it is quantized twice, or joined with plain weights",
        ),
    ];
    for (weight, message) in cases {
        let error = materialize(&weight, &source(), DType::Float16).unwrap_err();
        assert_eq!(error.to_string(), message);
        // What can be known from headers is refused before any data is read, too.
        let early = quant::layout(&weight, &source(), DType::Float16).err().map(|error| error.to_string());
        assert_eq!(early.is_none(), NEEDS_DATA.iter().any(|part| message.contains(part)), "{message}: {early:?}");
        assert!(early.is_none_or(|early| early == message));
    }
    let error =
        materialize(&packed(Format::Int4 { group: 3 }, Weight::tensor("a", &[6, 8])), &source(), DType::Float16);
    assert_eq!(error.unwrap_err().hint().unwrap(), "no group divides this width: use `int8` or `none` for this layer");
}

fn weights() -> Vec<Weight> {
    let (a, b) = (Weight::tensor("a", &[6, 8]), Weight::tensor("b", &[6, 8]));
    vec![
        packed(INT4, concat(0, vec![a.clone(), b.clone()])),
        packed(Format::Int8, b),
        Weight::tensor("vector", &[5]),
        Weight::tensor("scalar", &[]),
        Weight::tensor("ids", &[3]),
        a.clone(),
        slice(0, 2, 6, packed(INT4, a.clone())),
        // Six bytes whose key comes before that of the int64 ones.
        slice(1, 0, 3, slice(0, 0, 1, a.clone())),
        a,
    ]
}

#[test]
fn files_give_back_every_weight_and_are_the_same_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, weights: &[Weight]| {
        let path = folder.path().join(name);
        let mut steps = Vec::new();
        let mut progress = |done, total| steps.push((done, total));
        let summary = store_weights(weights.iter(), &source(), DType::Bfloat16, &path, &mut progress).unwrap();
        assert!(steps.is_sorted() && steps.last().is_some_and(|(done, total)| done == total));
        (path, summary)
    };
    let (path, summary) = write("one", &weights());
    let reversed: Vec<Weight> = weights().into_iter().rev().collect();
    let (other, again) = write("two", &reversed);
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes == std::fs::read(&other).unwrap() && summary == again);
    assert_eq!(summary.bytes, bytes.len() as u64);
    assert_eq!(summary.tensors, 8 + 3);

    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(header % 64, 0);
    let stored = StoredWeights::open(&path).unwrap();
    let mut places = Vec::new();
    for weight in weights() {
        let wanted = materialize_f32(&weight, &source(), DType::Bfloat16).unwrap();
        assert_eq!(stored.values(&weight).unwrap(), wanted, "{}", weight.key());
        let (place, scale) = stored.place_of(&weight).unwrap();
        if scale.is_none() {
            assert_eq!(place.offset % place.dtype.bytes(1) as u64, 0, "{}", weight.key());
        }
        places.extend([Some(place), scale].into_iter().flatten());
    }
    // No gaps: what safetensors asks for.
    places.sort_by_key(|place| place.offset);
    places.dedup();
    let end = places.iter().fold(header, |end, place| {
        assert_eq!(place.offset, end);
        end + place.bytes
    });
    assert_eq!(end, bytes.len() as u64);
}

#[test]
fn damaged_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights");
    store_weights(weights().iter(), &source(), DType::Float16, &path, &mut |_, _| ()).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let text = String::from_utf8_lossy(&whole[8..]).into_owned();
    assert!(text.starts_with("{\"__metadata__\":{\"format\":\"trtvlm\"}"), "{text}");

    let mut long = whole.clone();
    long[7] = 0x7f;
    let mut json = whole.clone();
    json[8] = b'[';
    for (bytes, message) in [
        (&whole[..5], "failed to fill whole buffer"),
        (&whole[..200], "a header of"),
        (&whole[..whole.len() - 1], "does not fit"),
        (&long, "a header of"),
        (&json, "its header is no JSON"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = StoredWeights::open(&path).err().unwrap();
        assert!(matches!(error, QuantError::File { .. }) && error.to_string().contains(message), "{error}");
    }
    std::fs::write(&path, &whole).unwrap();
    let stored = StoredWeights::open(&path).unwrap();
    for (weight, message) in [
        (Weight::tensor("missing", &[1]), "has no tensor `missing`"),
        (packed(Format::Int8, Weight::tensor("b", &[6, 4])), "tensor `b.int8` is int8[8, 6], wanted int8 of [6, 4]"),
        (Weight::tensor("vector", &[4]), "tensor `vector` is float16[5], wanted [4]"),
    ] {
        let error = stored.place_of(&weight).unwrap_err().to_string();
        assert!(error.ends_with(message), "{error}");
    }
}
