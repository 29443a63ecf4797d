//! `bench`: how fast the engines of a directory run, against what the GPU could do.
use crate::cli::{BenchArgs, Target};
use crate::cost::{Call, Cost, cost};
use crate::engine_dir::EngineDirectory;
use crate::failure::{Exit, Failure};
use crate::limits::{Limits, limits, median, middle};
use crate::report::{Printer, table};
use crate::runtime::{Executor, NETWORK, Ranks, RuntimeError, Tensorrt, Work};
use graphs::Network;
use serde::Serialize;
use serde_json::json;
use std::sync::{Arc, Mutex, PoisonError};

/// Decode steps of one measurement; the median of the steps is what counts.
const STEPS: usize = 48;

/// One line of the result.
#[derive(Debug, Serialize)]
struct Row {
    work: &'static str,
    batch: usize,
    /// Prompt tokens, or rows in the caches in decode.
    length: usize,
    milliseconds: f64,
    /// Tokens (pictures, for vision) a second.
    per_second: f64,
    operations_per_second: f64,
    bytes_per_second: f64,
    /// Share of the limit that binds: bytes in decode, arithmetic elsewhere.
    of_limit: Option<f64>,
}

pub fn run(args: &BenchArgs, printer: &Printer) -> Result<(), Failure> {
    let directory = EngineDirectory::open(&args.directory)?;
    super::run::check_target(&directory, Target::Tensorrt)?;
    let ranks = Ranks::tensorrt(&directory, &super::run::placement(&args.ranks))?;
    let config = directory.config(directory.language())?;
    // Of each rank by itself, one after the other: several may have one GPU.
    let limits = {
        let turn = Mutex::new(());
        let limits = ranks.first(move |engine| {
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(limits(engine.device())?)
        });
        Arc::new(limits?)
    };
    let sizes = config.build_config;
    let features = config.pretrained_config.multimodal.map_or(0, |found| found.num_visual_features);
    let lengths = if args.input_len.is_empty() {
        vec![default_length(features, sizes.max_input_len)]
    } else {
        args.input_len.clone()
    };
    let batches = if args.batch.is_empty() { vec![1] } else { args.batch.clone() };
    let steps = args.output_len.unwrap_or(STEPS).min(sizes.max_output_len).max(1);
    // A rank's part, where the model is divided: what one GPU does.
    let text_networks = Arc::new((reading(&directory)?, network(&directory, directory.language())?));
    let vision = if features > 0 { Some(Arc::new(network(&directory, "vision")?)) } else { None };
    let mut rows = Vec::new();
    for &batch in &batches {
        if let Some(vision) = &vision {
            let (vision, limits) = (Arc::clone(vision), Arc::clone(&limits));
            rows.push(ranks.first(move |engine| pictures(engine, &vision, &limits, batch))?);
        }
        for &length in &lengths {
            let prompts = vec![prompt(length, features, config.pretrained_config.vocab_size); batch];
            let (networks, limits) = (Arc::clone(&text_networks), Arc::clone(&limits));
            rows.extend(ranks.first(move |engine| text(engine, (&networks.0, &networks.1), &limits, &prompts, steps))?);
        }
    }
    if printer.is_json() {
        printer.json(&json!({ "schema": 1, "limits": *limits, "results": rows }));
        return Ok(());
    }
    let flops = limits.operations_per_second.map_or_else(
        || "no arithmetic limit: libcublasLt was not found".to_owned(),
        |limit| format!("{:.0} TFLOP/s by a float16 product of 8192 x 8192", limit / 1e12),
    );
    printer.data(&format!("{}: {:.0} GB/s by a copy, {flops}", limits.gpu, limits.copy_bytes_per_second / 1e9));
    let line = |row: &Row| {
        vec![
            row.work.to_owned(),
            row.batch.to_string(),
            row.length.to_string(),
            format!("{:.3}", row.milliseconds),
            format!("{:.1}", row.per_second),
            format!("{:.1}", row.operations_per_second / 1e12),
            format!("{:.0}", row.bytes_per_second / 1e9),
            row.of_limit.map_or_else(|| "-".into(), |share| format!("{:.1} %", share * 100.0)),
        ]
    };
    let head = ["work", "batch", "length", "ms", "a second", "TFLOP/s", "GB/s", "of the limit"];
    printer.data(&table(&head, &rows.iter().map(line).collect::<Vec<_>>()));
    Ok(())
}

/// A picture and 64 words, or 128 words, where that fits.
fn default_length(features: usize, limit: usize) -> usize {
    let wanted = if features > 0 { features + 64 } else { 128 };
    wanted.min(limit)
}

/// One picture, where the model takes any and it fits, then words.
fn prompt(length: usize, features: usize, vocab: usize) -> Vec<i32> {
    let pictured = if features < length { features } else { 0 };
    let rows = (0..pictured).map(|row| (vocab + row) as i32);
    rows.chain((0..length - pictured).map(|place| (place * 7919 % vocab) as i32)).collect()
}

fn network(directory: &EngineDirectory, name: &str) -> Result<Network, Failure> {
    let path = directory.file(&format!("{name}/{NETWORK}"))?;
    let text = std::fs::read_to_string(&path).map_err(super::eval::unreadable(&path))?;
    graphs::parse(&text).map_err(|error| Failure::of(Exit::Refused, &error))
}

/// The networks that read prompts for a decoder, none where it reads them itself.
fn reading(directory: &EngineDirectory) -> Result<Vec<Network>, Failure> {
    let found = directory.manifest.networks.iter().filter(|name| ["encoder", "cross"].contains(&name.as_str()));
    found.map(|name| network(directory, name)).collect()
}

fn pictures(engine: &mut Tensorrt, network: &Network, limits: &Limits, batch: usize) -> Result<Row, RuntimeError> {
    let [height, width] = engine.config().pretrained_config.multimodal.map_or([0, 0], |found| found.image_size);
    let pixels: Vec<f32> =
        (0..batch * 3 * height * width).map(|place| (place * 7919 % 2001) as f32 / 1e3 - 1.0).collect();
    engine.see(&pixels, batch)?;
    let seconds = recorded(engine, Work::Vision)?;
    let cost = cost(network, Call { batch, tokens: 1, past: 0, source: 0 });
    Ok(row("vision", batch, 1, seconds, batch, cost, limits))
}

/// Prefill, or what an encoder does in its place, then decode from there.
fn text(
    engine: &mut Tensorrt,
    (readers, decoder): (&[Network], &Network),
    limits: &Limits,
    prompts: &[Vec<i32>],
    steps: usize,
) -> Result<[Row; 2], RuntimeError> {
    let (batch, length) = (prompts.len(), prompts.first().map_or(0, Vec::len));
    engine.prefill_start(prompts)?;
    let seconds = recorded(engine, Work::Prefill)?;
    let source = if readers.is_empty() { 0 } else { length };
    let call = Call { batch, tokens: length, past: 0, source };
    let prefill_cost = match readers {
        [] => cost(decoder, call),
        readers => readers.iter().map(|network| cost(network, call)).sum(),
    };
    let prefill = row("prefill", batch, length, seconds, batch * length, prefill_cost, limits);
    engine.prefill_start(prompts)?;
    // The first step is recorded, and the first replay is not timed.
    engine.decode_steps(2)?;
    let mut times = Vec::new();
    for _ in 2..steps.max(3) {
        let device = engine.device().clone();
        times.push(device.time(|| engine.decode_steps(1))? / 1e3);
    }
    let seconds = middle(times);
    // The caches of a decoder behind an encoder hold new tokens only.
    let past = if readers.is_empty() { length } else { 1 } + steps / 2;
    let cost = cost(decoder, Call { batch, tokens: 1, past, source });
    let decode = row("decode", batch, past, seconds, batch, cost, limits);
    Ok([prefill, decode])
}

fn recorded(engine: &Tensorrt, work: Work) -> Result<f64, RuntimeError> {
    let graph = engine.record(work)?;
    let device = engine.device();
    median(device, || device.replay(&graph)).map_err(RuntimeError::from)
}

fn row(
    work: &'static str,
    batch: usize,
    length: usize,
    seconds: f64,
    items: usize,
    cost: Cost,
    limits: &Limits,
) -> Row {
    let operations_per_second = cost.operations / seconds;
    let bytes_per_second = (cost.weight_bytes + cost.cache_bytes) / seconds;
    let of_limit = match work {
        "decode" => Some(bytes_per_second / limits.copy_bytes_per_second),
        _ => limits.operations_per_second.map(|limit| operations_per_second / limit),
    };
    Row {
        work,
        batch,
        length,
        milliseconds: seconds * 1e3,
        per_second: items as f64 / seconds,
        operations_per_second,
        bytes_per_second,
        of_limit,
    }
}
