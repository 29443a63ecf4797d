//! Networks divided over ranks, all of them in one process, against the whole ones.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
mod common;
#[path = "prequantized/files.rs"]
mod files;
#[path = "prequantized/names.rs"]
mod names;

use common::*;
use files::peer;
use graphs::interpret::{Collective, Group};
use graphs::{DType, Entry, Logits, Op};
use names::PEERS;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use trtvlm::checkpoint::Options;
use trtvlm::compile::{Chosen, CompileError, Compiled, KvCache, Request, compile};
use trtvlm::engine_dir::{EngineConfig, SizeRequest};
use trtvlm::runtime::{Executor, Reference};
use trtvlm::source::CheckpointValues;

const STEPS: usize = 4;
const REQUESTS: usize = 3;

/// A model in float32, and how it is to be quantized and divided.
#[derive(Clone)]
struct Case {
    folder: PathBuf,
    quant: &'static str,
    calibration: Option<PathBuf>,
    divide_embedding: bool,
}

impl Case {
    fn new(folder: PathBuf, quant: &'static str) -> Case {
        Case { folder, quant, calibration: None, divide_embedding: true }
    }

    fn compile(&self, ranks: usize) -> Result<Compiled, CompileError> {
        let request = Request {
            model: self.folder.to_str().unwrap().to_owned(),
            language: None,
            vision_tower: None,
            tokenizer: None,
            dtype: Some(DType::Float32),
            quant: self.quant.to_owned(),
            vision_quant: "none".to_owned(),
            chosen: Chosen::default(),
            calibration: self.calibration.clone(),
            kv_cache: KvCache::Auto,
            tp: ranks,
            divide_embedding: self.divide_embedding,
            sizes: SizeRequest {
                max_batch_size: REQUESTS,
                max_input_len: None,
                max_output_len: Some(STEPS + 2),
                max_multimodal_len: None,
            },
            logits: Logits::Last,
            dump: None,
            marks: Vec::new(),
        };
        compile(&request, &Options::default())
    }

    fn name(&self) -> String {
        format!("{} {}", self.folder.file_name().unwrap().display(), self.quant)
    }

    /// Numbers of ranks that the model allows, besides one.
    fn possible(&self) -> Vec<usize> {
        (2..=8).filter(|&ranks| self.compile(ranks).is_ok()).collect()
    }
}

/// One rank's networks, ready to run.
fn executor(compiled: &Compiled, rank: usize) -> Reference {
    let own = compiled.networks.iter().filter(|passed| passed.network.name == "vision" || passed.rank == rank);
    let networks = own.map(|passed| passed.network.clone()).collect();
    let config = EngineConfig::new(&compiled.source.model, DType::Float32, Value::Null, compiled.tp, compiled.sizes);
    let values = CheckpointValues { source: compiled, compute: DType::Float32 };
    Reference::from_networks(networks, &values, config).unwrap()
}

/// What an executor says: logits of the prefill and of each step, and the tokens chosen.
type Said = (Vec<Vec<f32>>, Vec<Vec<u32>>);

/// Prompts of different lengths, each with a picture of its own where the model sees.
fn generate(mut executor: Reference, compiled: &Compiled) -> Said {
    let facts = compiled.source.facts();
    let mut prompts = vec![vec![5, 9, 2, 7, 11], vec![3], vec![8, 4, 6]];
    if let Some(pictures) = facts.pictures {
        let [height, width] = pictures.size;
        let pixel = |at: usize| ((at * 7919 % 1013) as f32 / 506.0) - 1.0;
        let pixels: Vec<f32> = (0..REQUESTS * 3 * height * width).map(pixel).collect();
        executor.see(&pixels, REQUESTS).unwrap();
        match pictures.entry {
            Entry::Prompt => prompts.iter_mut().enumerate().for_each(|(request, prompt)| {
                let rows = (0..pictures.features).map(|row| (facts.vocab + request * pictures.features + row) as i32);
                prompt.splice(1..1, rows);
            }),
            Entry::Source => prompts = vec![vec![0]; REQUESTS],
        }
    }
    let mut tokens = vec![executor.prefill(&prompts).unwrap()];
    let mut logits = vec![executor.outputs().unwrap()["logits"].values.clone()];
    for _ in 0..STEPS {
        tokens.extend(executor.decode(1).unwrap());
        logits.push(executor.outputs().unwrap()["logits"].values.clone());
    }
    (logits, tokens)
}

/// The largest difference, as a part of the largest number.
fn relative(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0, |most: f32, value| most.max(value.abs()));
    largest(&mut std::iter::zip(found, wanted).map(|(a, b)| a - b)) / largest(&mut wanted.iter().copied())
}

/// The same of each request in each call.
fn errors(found: &[Vec<f32>], wanted: &[Vec<f32>]) -> Vec<f32> {
    let call = |(found, wanted): (&Vec<f32>, &Vec<f32>)| {
        let width = wanted.len() / REQUESTS;
        std::iter::zip(found.chunks(width), wanted.chunks(width)).map(|(a, b)| relative(a, b)).collect::<Vec<_>>()
    };
    std::iter::zip(found, wanted).flat_map(call).collect()
}

/// What each rank says.
fn together(compiled: &Compiled) -> Vec<Said> {
    let members = Group::members(compiled.tp, Duration::from_secs(60));
    std::thread::scope(|scope| {
        let threads: Vec<_> = members
            .into_iter()
            .enumerate()
            .map(|(rank, member)| {
                let collective: Arc<dyn Collective> = Arc::new(member);
                scope.spawn(move || {
                    let executor = executor(compiled, rank).with_collective(&collective);
                    (generate(executor, compiled), collective)
                })
            })
            .collect();
        // Members live until all are done.
        let done: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        done.into_iter().map(|(said, _)| said).collect()
    })
}

fn compiled(case: &Case, ranks: usize) -> Compiled {
    let mut compiled = case.compile(ranks).unwrap_or_else(|error| panic!("{} by {ranks}: {error}", case.name()));
    compiled.search(&|_, _| ()).unwrap();
    compiled
}

/// Divides the model by each number of ranks; gives what is wrong.
///
/// Where inputs are rounded, a value between two steps may fall to the other side for a last bit, which changes all that
/// follows for that request; then most results must be right with the same tokens, and all of them near.
fn check(case: &Case, ranks: &[usize]) -> Vec<String> {
    let whole = compiled(case, 1);
    let ops = whole.networks.iter().flat_map(|passed| &passed.network.nodes).map(|node| &node.op);
    let rounds = ops.into_iter().any(|op| matches!(op, Op::QuantizeInput { .. }));
    let (whole, chosen) = generate(executor(&whole, 0), &whole);
    let mut wrong = Vec::new();
    for &ranks in ranks {
        for (rank, (logits, tokens)) in together(&compiled(case, ranks)).into_iter().enumerate() {
            let errors = errors(&logits, &whole);
            let within = |bound: f32| errors.iter().filter(|error| **error <= bound).count();
            let right = if rounds { 2 * within(1e-5) > errors.len() } else { within(1e-5) == errors.len() };
            // A result that is off may choose the other of two near equals.
            let (tokens, chosen) = (tokens.concat(), chosen.concat());
            assert_eq!([tokens.len(), chosen.len()], [errors.len(); 2], "{}", case.name());
            let both = std::iter::zip(tokens, chosen);
            let same = both.zip(&errors).all(|((found, wanted), error)| found == wanted || *error > 1e-5);
            if !right || within(2e-2) < errors.len() || !same {
                wrong.push(format!("{}: rank {rank} of {ranks} is off by {errors:?}", case.name()));
            }
        }
    }
    wrong
}

fn none(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Statistics of one sample.
fn calibrate(model: &Path, folder: &Path) -> PathBuf {
    let name = model.file_name().unwrap().to_str().unwrap();
    let (data, output) = (folder.join(format!("{name}.jsonl")), folder.join(format!("{name}.statistics")));
    let picture = image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([(x * 6) as u8, (y * 8) as u8, 99]));
    picture.save(folder.join("picture.png")).unwrap();
    let prompt = if name == "nougat" { "" } else { "What is it?" };
    let line = json!({ "prompt": prompt, "answer": "a cat", "image": "picture.png" });
    std::fs::write(&data, line.to_string()).unwrap();
    let [model, data, statistics] = [model, &data, &output].map(|path| path.to_str().unwrap());
    succeed(&["calibrate", model, "--data", data, "-o", statistics, "-q", "--dtype", "float32"]);
    output
}

#[test]
fn ranks_together_are_the_whole() {
    let mut wrong = Vec::new();
    for (name, wanted) in [
        ("llava-hf", &[2, 4][..]),
        ("llava-v4names", &[2, 4]),
        ("llava-v5names", &[2, 4]),
        ("vila-v10-clip", &[2, 4]),
        ("vila-v15-siglip", &[2, 4]),
        ("blip2-opt", &[2, 4]),
        ("blip2-t5", &[2, 4]),
        ("nougat", &[2, 4]),
        ("mbart", &[2]),
    ] {
        let case = Case::new(fixture(name), "none");
        assert_eq!(case.possible(), wanted, "{name}");
        wrong.extend(check(&case, wanted));
        wrong.extend(check(&Case { divide_embedding: false, ..case }, &[2]));
    }
    none(wrong);
}

const SCHEMES: [&str; 12] = [
    "int8",
    "int8-mse",
    "int8-absmax",
    "int8-absmax-token",
    "int8-sq",
    "int8-sq-token",
    "int8-awq",
    "int4-g16",
    "int4-channel",
    "int4-mse-g16",
    "int4-awq-g16",
    "int4-awq-channel",
];

#[test]
fn every_scheme_of_ours_divides() {
    let root = tempfile::tempdir().unwrap();
    let own = root.path().join("own");
    let config = llava_config(json!({}));
    write_checkpoint(&own, &config, &random_tensors(&config), DType::Float32, 1);
    let (mut wrong, mut cut) = (Vec::new(), Vec::new());
    for folder in [own, fixture("llava-hf"), fixture("blip2-opt"), fixture("blip2-t5"), fixture("nougat")] {
        let calibration = Some(calibrate(&folder, root.path()));
        for quant in SCHEMES {
            let case = Case { calibration: calibration.clone(), ..Case::new(folder.clone(), quant) };
            match case.compile(2) {
                Ok(_) => wrong.extend(check(&case, &[2])),
                Err(error) => {
                    assert!(error.to_string().contains("the group of its INT4 weights"), "{error}");
                    cut.push(case.name());
                }
            }
        }
    }
    // Matrices of these sizes have half a group on each rank.
    let halves = ["llava-hf", "blip2-opt"].iter().flat_map(|name| SCHEMES.map(|scheme| format!("{name} {scheme}")));
    assert_eq!(cut, halves.filter(|name| name.ends_with("g16")).collect::<Vec<_>>());
    none(wrong);
}

#[test]
fn what_other_tools_quantized_divides() {
    let root = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    for name in PEERS {
        let folder = root.path().join(name);
        peer(name, &folder, |_| ());
        let case = Case::new(folder, "none");
        let possible = case.possible();
        assert!(possible.contains(&2), "{name} by {possible:?}");
        wrong.extend(check(&case, &possible));
    }
    none(wrong);
}

/// A table of words and a head of the same numbers are one part on each rank.
#[test]
fn a_tied_head_has_the_part_of_the_table() {
    let root = tempfile::tempdir().unwrap();
    let config = llama_config(json!({ "tie_word_embeddings": true, "vocab_size": 449 }));
    write_checkpoint(root.path(), &config, &random_tensors(&config), DType::Float32, 1);
    let case = Case::new(root.path().to_path_buf(), "none");
    let divided = compiled(&case, 4);
    for passed in &divided.networks {
        let keys: Vec<String> = passed
            .network
            .nodes
            .iter()
            .filter_map(|node| match &node.op {
                Op::Embed { weight, .. } => Some(weight.key()),
                Op::Linear { weight, .. } if node.path == "lm_head" => Some(weight.key()),
                _ => None,
            })
            .collect();
        assert_eq!(keys.len(), 2);
        assert_eq!(keys[0], keys[1]);
    }
    none(check(&case, &[2, 4]));
}

#[test]
fn a_rank_alone_is_refused() {
    let mut alone = executor(&compiled(&Case::new(fixture("llava-hf"), "none"), 2), 0);
    let error = alone.prefill(&[vec![1, 2]]).unwrap_err().to_string();
    assert!(error.contains("embed_tokens/all_reduce`: it is one rank of several, the others do not run"), "{error}");
}

#[test]
fn what_no_rank_can_have_is_named() {
    let refused = |quant, ranks| Case::new(fixture("llava-hf"), quant).compile(ranks).err().unwrap();
    assert_eq!(refused("none", 3).hint().unwrap(), "--tp may be 1, 2, 4");
    let error = refused("int4-g16", 2);
    assert!(error.to_string().contains("24 of 2 ranks is no multiple of 16, the group of its INT4 weights"), "{error}");
    assert_eq!(error.hint().unwrap(), "--tp may be 1");
}

/// The binary builds all ranks, and runs them as it runs the whole.
#[test]
fn a_divided_directory_answers_as_a_whole_one() {
    let root = tempfile::tempdir().unwrap();
    for name in ["llava-hf", "blip2-t5"] {
        let answer = |tp: &str| {
            let output = root.path().join(format!("{name}-{tp}"));
            build_reference(&fixture(name), &output, &["--tp", tp, "--quant", "int8", "--max-batch-size", "2"]);
            let found = common::run(&output, &["--prompt", "Why?", "What is it?", "--max-new-tokens", "5"]);
            (output, found.iter().map(ids).collect::<Vec<_>>())
        };
        let (_, whole) = answer("1");
        let (output, divided) = answer("2");
        assert_eq!(whole, divided, "{name}");
        let manifest: Value = serde_json::from_slice(&std::fs::read(output.join("manifest.json")).unwrap()).unwrap();
        assert_eq!(manifest["tp"], 2);
        let language = if name == "blip2-t5" { "decoder" } else { "language" };
        assert!(manifest["files"][format!("{language}/rank1.network.txt")].is_object(), "{manifest}");
        let config: Value =
            serde_json::from_slice(&std::fs::read(output.join(language).join("config.json")).unwrap()).unwrap();
        assert_eq!(config["pretrained_config"]["mapping"], json!({ "world_size": 2, "tp_size": 2, "pp_size": 1 }));
    }
}
