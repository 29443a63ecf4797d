//! LLaVA against the goldens that transformers made: name coverage, parity, the text of one layer.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
use graphs::interpret::{Array, Caches, Interpreter, Values};
use graphs::{Coverage, DType, Logits, Model, Network, Weight, cover};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::PathBuf;

const FIXTURES: [&str; 3] = ["llava-hf", "llava-v4names", "llava-v5names"];

struct Fixture {
    model: Model,
    weights: Vec<u8>,
    golden: Vec<u8>,
}

struct Tensors<'a> {
    file: SafeTensors<'a>,
    coverage: &'a Coverage,
}

impl Values for Tensors<'_> {
    fn values(&self, weight: &Weight) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(floats(&self.file, &self.coverage.found[&weight.key()]))
    }
}

fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    let view = file.tensor(name).unwrap();
    view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn ints(file: &SafeTensors, name: &str) -> Vec<i32> {
    let view = file.tensor(name).unwrap();
    view.data().chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()) as i32).collect()
}

fn open(name: &str) -> Fixture {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name);
    let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
    let model = Model::from_config(&serde_json::from_slice(&read("config.json")).unwrap()).unwrap();
    Fixture { model, weights: read("model.safetensors"), golden: read("golden.safetensors") }
}

fn covered(fixture: &Fixture, networks: &[Network]) -> Coverage {
    let file = SafeTensors::deserialize(&fixture.weights).unwrap();
    cover(&fixture.model, networks, file.names().into_iter())
}

fn worst(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    std::iter::zip(found, wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn every_tensor_is_used_or_known_to_be_unused() {
    for name in FIXTURES {
        let fixture = open(name);
        let coverage = covered(&fixture, &fixture.model.networks(DType::Float32, Logits::Last).unwrap());
        assert_eq!(coverage.missing, Vec::<String>::new(), "{name}");
        assert_eq!(coverage.unused, Vec::<String>::new(), "{name}");
        // The last vision block (feature layer -2) and the norm behind it.
        assert_eq!((coverage.found.len(), coverage.ignored.len()), (62, 18), "{name}");
    }
}

#[test]
fn vision_and_language_agree_with_transformers() {
    for name in FIXTURES {
        let fixture = open(name);
        let networks = fixture.model.networks(DType::Float32, Logits::All).unwrap();
        let coverage = covered(&fixture, &networks);
        let source = Tensors { file: SafeTensors::deserialize(&fixture.weights).unwrap(), coverage: &coverage };
        let golden = SafeTensors::deserialize(&fixture.golden).unwrap();
        let [vision, language] =
            <[Network; 2]>::try_from(networks).unwrap().map(|network| Interpreter::new(network, &source).unwrap());

        let pixels = Array::float([1, 3, 28, 28], floats(&golden, "pixel_values"));
        let mut features = Vec::new();
        let mut tap = |node: &graphs::Node, value: &Array| {
            if matches!(node.op, graphs::Op::Slice { .. }) {
                features = value.floats().unwrap().to_vec();
            }
        };
        let mut caches = Caches::new(vision.network(), 1, 0);
        let outputs = vision.run(&BTreeMap::from([("input", pixels)]), &mut caches, Some(&mut tap)).unwrap();
        let projected = outputs["output"].floats().unwrap();
        assert!(worst(&features, &floats(&golden, "vision_features")) < 1e-4, "{name}");
        assert!(worst(projected, &floats(&golden, "projector_out")) < 1e-4, "{name}");

        let facts = fixture.model.facts();
        let pictures = facts.pictures.unwrap();
        let mut row = 0;
        let mut ids = ints(&golden, "input_ids");
        for id in ids.iter_mut().filter(|id| **id == pictures.token_id as i32) {
            *id = (facts.vocab + row) as i32;
            row += 1;
        }
        assert_eq!(row, pictures.features);
        let table = Array::float([pictures.features, facts.hidden], projected.to_vec());
        let prompt = ids.len();
        let generated = ints(&golden, "generated");
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
        assert!(worst(&logits, &floats(&golden, "logits")) < 1e-4, "{name}");
        let mut last = logits[(prompt - 1) * facts.vocab..].to_vec();
        for (index, &wanted) in generated.iter().enumerate() {
            let best = (0..facts.vocab).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
            assert_eq!(best as i32, wanted, "{name}, token {index}");
            last = step(&[wanted], prompt + index);
        }
    }
}

#[test]
fn one_layer_as_text() {
    let networks = open("llava-hf").model.networks(DType::Float16, Logits::Last).unwrap();
    let lines = |network: &Network, part: &str| {
        let text = graphs::print(network);
        assert_eq!(&graphs::parse(&text).unwrap(), network);
        text.lines().filter(|line| line.contains(part)).collect::<Vec<_>>().join("\n")
    };
    insta::assert_snapshot!("clip_layer", lines(&networks[0], " vision_tower.vision_model.encoder.layers.0."));
    insta::assert_snapshot!("llama_layer", lines(&networks[1], " language_model.model.layers.0."));
}
