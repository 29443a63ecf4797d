//! Checkpoints that other tools have quantized: their own integers, their logits on the reference, engines, refusals.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;
#[path = "prequantized/files.rs"]
mod files;

use common::*;
use files::{PEERS, peer};
use graphs::interpret::{Array, Caches, Interpreter};
use graphs::{DType, Logits};
use quant::Recipe;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;
use trtvlm::checkpoint::Checkpoint;
use trtvlm::passes::{self, Passed};
use trtvlm::source::{CheckpointValues, ModelSource};

fn open(folder: &Path) -> (ModelSource, Passed) {
    let source = ModelSource::new(Checkpoint::open_folder(folder).unwrap()).unwrap();
    let network = source.networks(DType::Float32, Logits::All).unwrap().remove(0);
    let recipe = Recipe::preset("none").unwrap();
    let quantized = |name: &str| source.quantized_linear(name);
    let plan = passes::Plan { recipe: &recipe, dump: None, marks: &[], quantized: &quantized };
    let passed = passes::run(network, &plan).unwrap();
    (source, passed)
}

/// Logits of every token.
fn logits(folder: &Path, ids: &[i32]) -> Vec<f32> {
    let (source, passed) = open(folder);
    let values = CheckpointValues { source: &source, compute: DType::Float32 };
    let count = ids.len() as i32;
    let mut caches = Caches::new(&passed.network, 1, ids.len());
    let inputs = BTreeMap::from([
        ("input_ids", Array::int([1, ids.len()], ids.to_vec())),
        ("position_ids", Array::int([1, ids.len()], (0..count).collect::<Vec<_>>())),
        ("past_lengths", Array::int([1], vec![0])),
        ("sequence_lengths", Array::int([1], vec![count])),
    ]);
    let interpreter = Interpreter::new(passed.network, &values).unwrap();
    interpreter.run(&inputs, &mut caches, None).unwrap()["logits"].floats().unwrap().to_vec()
}

/// The largest difference, as a part of the largest number.
fn relative(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let most = wanted.iter().fold(0f32, |most, x| most.max(x.abs()));
    std::iter::zip(found, wanted).fold(0f32, |worst, (a, b)| worst.max((a - b).abs())) / most
}

#[test]
fn logits_are_those_of_the_tools() {
    let mut failed = Vec::new();
    for name in PEERS {
        let root = tempfile::tempdir().unwrap();
        peer(name, root.path(), |_| ());
        let golden = std::fs::read(fixture("peers").join(name).join("golden.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&golden).unwrap();
        let ids = golden.tensor("input_ids").unwrap();
        let ids: Vec<i32> =
            ids.data().as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes) as i32).collect();
        let wanted = quant::to_f32(DType::Float32, golden.tensor("logits").unwrap().data());
        let error = relative(&logits(root.path(), &ids), &wanted);
        println!("{name}: {error:e}");
        let bound = if name.contains("w8a8") { 2e-2 } else { 1e-3 };
        if error >= bound {
            failed.push(format!("{name}: {error:e}"));
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}
