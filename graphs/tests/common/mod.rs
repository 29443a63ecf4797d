//! What the tests of every model need: a fixture's tensors in the interpreter, its golden beside them.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
use graphs::interpret::{Array, Caches, Interpreter, Values};
use graphs::{Coverage, DType, Logits, Model, Network, Node, Weight, cover};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::PathBuf;

pub(crate) struct Fixture {
    pub(crate) model: Model,
    /// Files of weights, each with what its tensors' names begin with in the whole.
    files: Vec<(String, Vec<u8>)>,
    golden: Vec<u8>,
}

/// A fixture whose weights lie in the named parts (folders), or in one file where there are none.
pub(crate) fn open(name: &str, parts: &[&str]) -> Fixture {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name);
    let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
    let model = Model::from_config(&serde_json::from_slice(&read("config.json")).unwrap()).unwrap();
    let files = match parts {
        [] => vec![(String::new(), read("model.safetensors"))],
        _ => parts.iter().map(|part| (format!("{part}."), read(&format!("{part}/model.safetensors")))).collect(),
    };
    Fixture { model, files, golden: read("golden.safetensors") }
}

struct Tensors<'f> {
    tensors: BTreeMap<String, Vec<f32>>,
    coverage: &'f Coverage,
}

impl Values for Tensors<'_> {
    fn values(&self, weight: &Weight) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        match weight {
            Weight::Slice { axis: 0, start, end, of } => {
                let row: usize = of.shape()[1..].iter().product();
                Ok(self.values(of)?[start * row..end * row].to_vec())
            }
            _ => Ok(self.tensors[&self.coverage.found[&weight.key()]].clone()),
        }
    }
}

impl Fixture {
    pub(crate) fn networks(&self, logits: Logits) -> Vec<Network> {
        self.model.networks(DType::Float32, logits).unwrap()
    }

    /// Names of all tensors in the files.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        for (prefix, bytes) in &self.files {
            let file = SafeTensors::deserialize(bytes).unwrap();
            names.extend(file.names().into_iter().map(|name| format!("{prefix}{name}")));
        }
        names
    }

    pub(crate) fn coverage(&self, networks: &[Network]) -> Coverage {
        let names = self.names();
        cover(&self.model, networks, names.iter().map(String::as_str))
    }

    /// The networks with their weights.
    pub(crate) fn interpreters(&self, logits: Logits) -> Vec<Interpreter> {
        self.interpreters_of(self.networks(logits))
    }

    /// The same of networks that passes have changed.
    pub(crate) fn interpreters_of(&self, networks: Vec<Network>) -> Vec<Interpreter> {
        let coverage = &self.coverage(&networks);
        let mut tensors = BTreeMap::new();
        for (prefix, bytes) in &self.files {
            let file = SafeTensors::deserialize(bytes).unwrap();
            for (name, view) in file.iter().filter(|(_, view)| view.dtype() == safetensors::Dtype::F32) {
                tensors.insert(format!("{prefix}{name}"), floats(view.data()));
            }
        }
        let source = Tensors { tensors, coverage };
        networks.into_iter().map(|network| Interpreter::new(network, &source).unwrap()).collect()
    }

    pub(crate) fn golden(&self, name: &str) -> Vec<f32> {
        floats(SafeTensors::deserialize(&self.golden).unwrap().tensor(name).unwrap().data())
    }

    pub(crate) fn golden_ints(&self, name: &str) -> Vec<i32> {
        ints(&self.golden, name)
    }

    /// An int64 tensor of the weights' only file.
    pub(crate) fn ints(&self, name: &str) -> Vec<i32> {
        ints(&self.files[0].1, name)
    }
}

fn ints(file: &[u8], name: &str) -> Vec<i32> {
    let file = SafeTensors::deserialize(file).unwrap();
    let data = file.tensor(name).unwrap().data();
    data.chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()) as i32).collect()
}

/// Weights by their names alone, for models of which there is no file.
pub(crate) struct Drawn;

impl Values for Drawn {
    fn values(&self, weight: &Weight) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        let key = weight.key();
        let mut state =
            key.bytes().fold(0x9E37_79B9u32, |state, byte| (state ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        let scale = 1.5 / (*weight.shape().last().unwrap() as f32).sqrt();
        let middle = if key.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let mut draw = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (f32::from((state >> 16) as u16) / 32768.0 - 1.0) * scale + middle
        };
        Ok((0..weight.count()).map(|_| draw()).collect())
    }
}

fn floats(data: &[u8]) -> Vec<f32> {
    data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// The largest difference.
pub(crate) fn worst(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    std::iter::zip(found, wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// What a vision network makes of the golden's pixels, and every value on the way by its node's path.
pub(crate) fn see(vision: &Interpreter, pixels: Array) -> (Vec<f32>, BTreeMap<String, Vec<f32>>) {
    let mut values = BTreeMap::new();
    let mut tap = |node: &Node, value: &Array| {
        values.insert(node.path.clone(), value.floats().unwrap().to_vec());
    };
    let mut caches = Caches::new(vision.network(), 1, 0);
    let outputs = vision.run(&BTreeMap::from([("input", pixels)]), &mut caches, Some(&mut tap)).unwrap();
    (outputs["output"].floats().unwrap().to_vec(), values)
}

/// The golden's prompt with rows of `projected` in the place of `image` ids, then its greedy ids one by one: all logits of
/// the prompt and each choice agree.
pub(crate) fn check_language(fixture: &Fixture, language: &Interpreter, projected: Vec<f32>, image: usize) {
    let facts = fixture.model.facts();
    let features = facts.pictures.unwrap().features;
    let (ids, rows) = spliced(fixture, image);
    assert_eq!(rows, features);
    let table = Array::float([features, facts.hidden], projected);
    let logits = continue_prompt(language, &ids, &table, &fixture.golden_ints("generated"));
    let error = worst(&logits, &fixture.golden("logits"));
    assert!(error < 1e-4, "{error}");
}

/// The golden's prompt with rows of the prompt table in the place of `image` ids, and how many they are.
pub(crate) fn spliced(fixture: &Fixture, image: usize) -> (Vec<i32>, usize) {
    let vocab = fixture.model.facts().vocab;
    let mut ids = fixture.golden_ints("input_ids");
    let mut rows = 0;
    for id in ids.iter_mut().filter(|id| **id as usize == image) {
        *id = (vocab + rows) as i32;
        rows += 1;
    }
    (ids, rows)
}

/// Logits of the prompt `[tokens, vocab]`; then each of `generated` must be the likeliest token after those before it.
pub(crate) fn continue_prompt(language: &Interpreter, ids: &[i32], table: &Array, generated: &[i32]) -> Vec<f32> {
    let mut caches = Caches::new(language.network(), 1, ids.len() + generated.len());
    let mut step = |ids: &[i32], past: usize| {
        let count = ids.len();
        let inputs = BTreeMap::from([
            ("input_ids", Array::int([1, count], ids.to_vec())),
            ("position_ids", Array::int([1, count], (past..past + count).map(|p| p as i32).collect())),
            ("past_lengths", Array::int([1], vec![past as i32])),
            ("sequence_lengths", Array::int([1], vec![(past + count) as i32])),
            ("prompt_embedding_table", table.clone()),
        ]);
        language.run(&inputs, &mut caches, None).unwrap()["logits"].floats().unwrap().to_vec()
    };
    let logits = step(ids, 0);
    let vocab = logits.len() / ids.len();
    let mut last = logits[logits.len() - vocab..].to_vec();
    for (index, &wanted) in generated.iter().enumerate() {
        let best = (0..vocab).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        assert_eq!(best as i32, wanted, "token {index}");
        last = step(&[wanted], ids.len() + index);
    }
    logits
}

/// The lines of a network's text that hold `part`; the text reads back as the network.
pub(crate) fn lines(network: &Network, part: &str) -> String {
    let text = graphs::print(network);
    assert_eq!(&graphs::parse(&text).unwrap(), network);
    text.lines().filter(|line| line.contains(part)).collect::<Vec<_>>().join("\n")
}
