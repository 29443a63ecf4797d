//! Networks divided over ranks, all of them in one process, against the whole ones.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
mod common;
use common::*;
use graphs::interpret::{Collective, Group};
use graphs::{DType, Logits};
use quant::Recipe;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use trtvlm::checkpoint::{Checkpoint, Options};
use trtvlm::engine_dir::{EngineConfig, SizeRequest};
use trtvlm::passes::{PassError, Plan, run};
use trtvlm::runtime::{Executor, Reference};
use trtvlm::source::{CheckpointValues, ModelSource};

const STEPS: usize = 6;

fn open(name: &str) -> ModelSource {
    ModelSource::new(Checkpoint::open(fixture(name).to_str().unwrap(), &Options::default()).unwrap()).unwrap()
}

/// One rank's networks, ready to run.
fn rank(source: &ModelSource, recipe: &Recipe, rank: usize, ranks: usize) -> Result<Reference, PassError> {
    let none = Recipe::preset("none").unwrap();
    let mut networks = Vec::new();
    for network in source.networks(DType::Float32, Logits::Last).unwrap() {
        let recipe = if network.name == "vision" { &none } else { recipe };
        networks.push(run(network, &Plan { rank, ranks, ..Plan::new(recipe) })?.network);
    }
    let sizes = SizeRequest {
        max_batch_size: 3,
        max_input_len: None,
        max_output_len: Some(STEPS + 2),
        max_multimodal_len: None,
    };
    let sizes = sizes.resolve(&source.facts()).unwrap();
    let config = EngineConfig::new(&source.model, DType::Float32, Value::Null, ranks, sizes);
    let values = CheckpointValues { source, compute: DType::Float32 };
    Ok(Reference::from_networks(networks, &values, config).unwrap())
}

/// Logits of the prefill and of each step, and the tokens chosen.
fn generate(mut executor: Reference) -> (Vec<f32>, Vec<Vec<u32>>) {
    let prompts = [vec![5, 9, 2, 7, 11], vec![3], vec![8, 4, 6]];
    let mut tokens = vec![executor.prefill(&prompts).unwrap()];
    let mut logits = executor.outputs().unwrap()["logits"].values.clone();
    for _ in 0..STEPS {
        tokens.extend(executor.decode(1).unwrap());
        logits.extend(&executor.outputs().unwrap()["logits"].values);
    }
    (logits, tokens)
}

/// The largest difference, as a part of the largest number.
fn relative(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0, |most: f32, value| most.max(value.abs()));
    largest(&mut std::iter::zip(found, wanted).map(|(a, b)| a - b)) / largest(&mut wanted.iter().copied())
}

/// Every rank's logits and tokens.
fn together(source: &ModelSource, recipe: &Recipe, ranks: usize) -> Vec<(Vec<f32>, Vec<Vec<u32>>)> {
    let members = Group::members(ranks, Duration::from_secs(60));
    std::thread::scope(|scope| {
        let threads: Vec<_> = members
            .into_iter()
            .enumerate()
            .map(|(number, member)| {
                let collective: Arc<dyn Collective> = Arc::new(member);
                scope.spawn(move || {
                    let executor = rank(source, recipe, number, ranks).unwrap().with_collective(&collective);
                    (generate(executor), collective)
                })
            })
            .collect();
        // Members live until all are done.
        let done: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        done.into_iter().map(|(found, _)| found).collect()
    })
}

/// Numbers of ranks that the model's heads allow, besides one.
fn possible(source: &ModelSource) -> Vec<usize> {
    let recipe = Recipe::preset("none").unwrap();
    (2..=8).filter(|&ranks| rank(source, &recipe, 0, ranks).is_ok()).collect()
}

#[test]
fn ranks_together_are_the_whole() {
    for (name, wanted) in
        [("llava-hf", &[2, 4][..]), ("vila-v15-siglip", &[2, 4]), ("blip2-opt", &[2, 4]), ("blip2-t5", &[2, 4])]
    {
        let source = open(name);
        assert_eq!(possible(&source), wanted, "{name}");
        for recipe in ["none", "int8"] {
            let recipe = Recipe::preset(recipe).unwrap();
            let (whole, chosen) = generate(rank(&source, &recipe, 0, 1).unwrap());
            for &ranks in wanted {
                for (number, (logits, tokens)) in together(&source, &recipe, ranks).into_iter().enumerate() {
                    let error = relative(&logits, &whole);
                    assert!(error < 1e-5, "{name} {}: rank {number} of {ranks} is off by {error}", recipe.name);
                    assert_eq!(tokens, chosen, "{name} {}: rank {number} of {ranks}", recipe.name);
                }
            }
        }
    }
}

#[test]
fn a_rank_alone_is_refused() {
    let recipe = Recipe::preset("none").unwrap();
    let mut alone = rank(&open("llava-hf"), &recipe, 0, 2).unwrap();
    let error = alone.prefill(&[vec![1, 2]]).unwrap_err().to_string();
    assert!(error.contains("o_proj/all_reduce`: it is one rank of several, the others do not run"), "{error}");
}

#[test]
fn what_no_rank_can_have_is_named() {
    let source = open("llava-hf");
    let recipe = Recipe::preset("none").unwrap();
    let error = rank(&source, &recipe, 0, 3).err().unwrap();
    assert_eq!(error.hint().unwrap(), "--tp may be 1, 2, 4");
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
