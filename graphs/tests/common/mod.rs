//! What the parity tests share: fixtures and the goldens that transformers made.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
use graphs::interpret::{Array, Caches, Interpreter, Values};
use graphs::{Coverage, Facts, Model, Network, Weight, cover};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::PathBuf;

pub(crate) struct Fixture {
    pub(crate) model: Model,
    pub(crate) weights: Vec<u8>,
    pub(crate) golden: Vec<u8>,
}

pub(crate) struct Tensors<'a> {
    pub(crate) file: SafeTensors<'a>,
    pub(crate) coverage: &'a Coverage,
}

impl Values for Tensors<'_> {
    fn values(&self, weight: &Weight) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        match weight {
            Weight::Tensor { name, .. } => Ok(floats(&self.file, &self.coverage.found[name])),
            Weight::Slice { axis: 0, start, end, of } => {
                let row: usize = of.shape()[1..].iter().product();
                Ok(self.values(of)?[start * row..end * row].to_vec())
            }
            other => Err(format!("{other:?}").into()),
        }
    }
}

pub(crate) fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    let view = file.tensor(name).unwrap();
    view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

pub(crate) fn ints(file: &SafeTensors, name: &str) -> Vec<i32> {
    let view = file.tensor(name).unwrap();
    view.data().chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()) as i32).collect()
}

pub(crate) fn open(name: &str) -> Fixture {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name);
    let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
    let model = Model::from_config(&serde_json::from_slice(&read("config.json")).unwrap()).unwrap();
    Fixture { model, weights: read("model.safetensors"), golden: read("golden.safetensors") }
}

pub(crate) fn covered(fixture: &Fixture, networks: &[Network]) -> Coverage {
    let file = SafeTensors::deserialize(&fixture.weights).unwrap();
    cover(&fixture.model, networks, file.names().into_iter())
}

pub(crate) fn worst(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    std::iter::zip(found, wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Feeds the golden's prompt, picture rows in the place of `image` ids, then its greedy ids one by one: all logits of the
/// prompt and each choice agree.
pub(crate) fn check_language(
    language: &Interpreter,
    facts: &Facts,
    golden: &SafeTensors,
    projected: &[f32],
    image: i32,
) {
    let mut row = 0;
    let mut ids = ints(golden, "input_ids");
    for id in ids.iter_mut().filter(|id| **id == image) {
        *id = (facts.vocab + row) as i32;
        row += 1;
    }
    let features = facts.pictures.unwrap().features;
    assert_eq!(row, features);
    let table = Array::float([features, facts.hidden], projected.to_vec());
    let prompt = ids.len();
    let generated = ints(golden, "generated");
    let mut caches = Caches::new(language.network(), 1, prompt + generated.len());
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
    let logits = step(&ids, 0);
    let error = worst(&logits, &floats(golden, "logits"));
    assert!(error < 1e-4, "{error}");
    let mut last = logits[(prompt - 1) * facts.vocab..].to_vec();
    for (index, &wanted) in generated.iter().enumerate() {
        let best = (0..facts.vocab).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        assert_eq!(best as i32, wanted, "token {index}");
        last = step(&[wanted], prompt + index);
    }
}

/// The lines of a network's text that hold `part`, once the text has been read back.
pub(crate) fn lines(network: &Network, part: &str) -> String {
    let text = graphs::print(network);
    assert_eq!(&graphs::parse(&text).unwrap(), network);
    text.lines().filter(|line| line.contains(part)).collect::<Vec<_>>().join("\n")
}
