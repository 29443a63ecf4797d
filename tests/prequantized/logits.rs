//! A checkpoint's own logits on the reference, as its quantization says.
use graphs::interpret::{Array, Caches, Interpreter};
use graphs::{DType, Logits};
use quant::Recipe;
use std::collections::BTreeMap;
use std::path::Path;
use trtvlm::checkpoint::Checkpoint;
use trtvlm::passes::{self, Passed};
use trtvlm::source::{CheckpointValues, ModelSource};

/// A folder and its language network after the passes.
pub(crate) fn open(folder: &Path) -> (ModelSource, Passed) {
    let source = ModelSource::new(Checkpoint::open_folder(folder).unwrap()).unwrap();
    let networks = source.networks(DType::Float32, Logits::All).unwrap();
    let network = networks.into_iter().find(|network| network.name == "language").unwrap();
    let recipe = Recipe::preset("none").unwrap();
    let quantized = |name: &str| source.quantized_linear(name);
    let plan = passes::Plan { quantized: &quantized, ..passes::Plan::new(&recipe) };
    let passed = passes::run(network, &plan).unwrap();
    (source, passed)
}

/// Logits of every token.
pub(crate) fn logits(folder: &Path, ids: &[i32]) -> Vec<f32> {
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

/// The root of the mean squared difference, as a part of that of the numbers.
pub(crate) fn relative(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
    let differences = squares(&mut std::iter::zip(found, wanted).map(|(a, b)| a - b));
    (differences / squares(&mut wanted.iter().copied())).sqrt()
}

/// Ids and logits of a file that a tool wrote.
pub(crate) fn golden(path: &Path) -> (Vec<i32>, Vec<f32>) {
    let bytes = std::fs::read(path).unwrap();
    let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ids = golden.tensor("input_ids").unwrap();
    let ids = ids.data().as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes) as i32).collect();
    (ids, quant::to_f32(DType::Float32, golden.tensor("logits").unwrap().data()))
}
