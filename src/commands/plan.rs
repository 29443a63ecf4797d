//! `plan`: what a build would do, from headers alone.
use super::build::{compile_reported, request};
use super::{mixed, quality};
use crate::cli::{PlanArgs, Target};
use crate::compile::Compiled;
use crate::failure::Failure;
use crate::passes::Passed;
use crate::report::{Printer, bytes, table};
use graphs::{Attention, Format, Network, Node, Op};
use quant::Layout;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Peak own memory of a TensorRT-RTX build as a multiple of the bytes of its weights, by their format, and what the
/// library takes for itself. Measured by `benches/build.rs`; a build reports what it really took.
const OWN_MEMORY: [(&str, f64); 3] = [("plain", 1.75), ("int8", 1.85), ("int4", 3.0)];
const LIBRARY_BYTES: f64 = 130e6;
/// The same of the biases that it works out for windows with walls: at most so much in builds of nougat-base's shape.
const BIAS_MEMORY: f64 = 6.5;

/// One weight: where it comes from and what becomes of it.
struct Row {
    path: String,
    sources: Vec<String>,
    stored: String,
    bytes: u64,
    note: Option<String>,
}

pub fn run(args: &PlanArgs, printer: &Printer) -> Result<(), Failure> {
    quality::check_place(args.quality.report.as_deref())?;
    let request = mixed::resolve(&request(&args.options), printer)?;
    let mut compiled = compile_reported(&request, printer)?;
    let asked = args.quality.report.is_some() || args.quality.max_error.is_some();
    // Without that headers are enough.
    let layers =
        if asked { quality::search_and_measure(&mut compiled, &request, &args.quality, printer)? } else { None };
    let mut networks = Vec::new();
    let mut summary = Vec::new();
    let mut lines = Vec::new();
    for passed in &compiled.networks {
        let rows = rows(&compiled, passed)?;
        let weights: u64 = rows.iter().map(|row| row.bytes).sum();
        let rtx = args.options.target.contains(&Target::Rtx).then(|| own_memory(&rows, &passed.network));
        summary.push(vec![
            passed.label(),
            formats(passed),
            rows.len().to_string(),
            bytes(weights),
            rtx.map_or_else(|| "-".into(), bytes),
        ]);
        networks.push(network_json(&compiled, passed, &rows, weights, rtx));
        let line = |row: Row| vec![row.path, row.stored, bytes(row.bytes), row.note.unwrap_or_default()];
        lines.extend(rows.into_iter().map(line));
    }
    let sizes = compiled.sizes;
    if printer.is_json() {
        let ignored = &compiled.source.coverage().ignored;
        printer.json(&json!({
            "schema": 1, "model": args.options.model, "dtype": compiled.dtype, "sizes": sizes,
            "quantization": compiled.quantization, "recipes": compiled.chosen, "networks": networks, "ignored": ignored,
            "quality": quality::to_json(layers.as_ref()),
        }));
        return Ok(());
    }
    if printer.is_verbose() {
        printer.data(&table(&["weight", "stored as", "bytes", "note"], &lines));
    }
    printer.data(&table(&["network", "formats", "weights", "bytes", "RTX build memory"], &summary));
    for (network, name) in compiled.quantization.iter().filter(|(_, name)| *name != "none") {
        printer.data(&format!("{network}: quantization {name}"));
    }
    for text in [&compiled.chosen.language, &compiled.chosen.vision].into_iter().flatten() {
        printer.data(text);
    }
    printer.data(&format!(
        "type {}; at most {} requests, {} prompt and {} new tokens, {} rows of picture features",
        compiled.dtype,
        sizes.max_batch_size,
        sizes.max_input_len,
        sizes.max_output_len,
        sizes.max_prompt_embedding_table_size
    ));
    let notes = compiled.networks.iter().filter(|passed| passed.rank == 0).flat_map(|passed| &passed.assignments);
    let notes = notes.filter(|choice| choice.note.is_some());
    let notes: Vec<_> = notes.collect();
    if let [first, ..] = notes[..] {
        let note = first.note.clone().unwrap_or_default();
        printer.data(&format!(
            "{} layers differ from the recipe's first choice (`{}`: {note}); -v lists them",
            notes.len(),
            first.path
        ));
    }
    Ok(())
}

fn rows(compiled: &Compiled, passed: &Passed) -> Result<Vec<Row>, Failure> {
    let notes: BTreeMap<&str, &String> =
        passed.assignments.iter().filter_map(|choice| Some((choice.path.as_str(), choice.note.as_ref()?))).collect();
    let mut seen = std::collections::BTreeSet::new();
    let mut rows = Vec::new();
    for (node, weight) in passed.network.weights() {
        if !seen.insert(weight.key()) {
            continue;
        }
        let parts = quant::layout(weight, compiled, compiled.dtype)?;
        let name = |name: &str| compiled.source.tensor(name).map_or(name, |(stored, _)| stored).to_owned();
        let shown = |part: &Layout| format!("{} {:?}", part.dtype, part.shape);
        let note = notes.get(node.path.as_str()).map(|note| (*note).clone());
        rows.push(Row {
            path: weight.key(),
            sources: weight.tensors().into_iter().map(|(tensor, _)| name(tensor)).collect(),
            stored: parts.iter().map(shown).collect::<Vec<_>>().join(" + "),
            bytes: parts.iter().map(|part| part.bytes).sum(),
            note,
        });
    }
    Ok(rows)
}

fn own_memory(rows: &[Row], network: &Network) -> u64 {
    let factor = |row: &Row| {
        let format = OWN_MEMORY.iter().find(|(format, _)| row.stored.starts_with(format)).unwrap_or(&OWN_MEMORY[0]);
        row.bytes as f64 * format.1
    };
    (LIBRARY_BYTES + rows.iter().map(factor).sum::<f64>() + BIAS_MEMORY * bias_bytes(network)) as u64
}

/// What TensorRT works out of the biases of windows with walls while it builds.
fn bias_bytes(network: &Network) -> f64 {
    let bytes = |node: &Node| match &node.op {
        Op::Attention(Attention { window_bias: Some(bias), heads, .. }) if bias.has_walls() => {
            network.dtype.bytes(heads * bias.places() * bias.places()) as f64
        }
        _ => 0.0,
    };
    network.nodes.iter().map(bytes).sum()
}

/// `int4_g128 x 224, plain x 1` over the linear layers.
fn formats(passed: &Passed) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for choice in &passed.assignments {
        let name = choice.format.as_ref().map_or_else(|| passed.network.dtype.name().to_owned(), Format::to_string);
        *counts.entry(name).or_default() += 1;
    }
    counts.iter().map(|(name, count)| format!("{name} x {count}")).collect::<Vec<_>>().join(", ")
}

fn network_json(compiled: &Compiled, passed: &Passed, rows: &[Row], weights: u64, rtx: Option<u64>) -> Value {
    let tensors: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "weight": row.path, "sources": row.sources, "stored": row.stored, "bytes": row.bytes, "note": row.note,
            })
        })
        .collect();
    let caches = passed.network.caches();
    let cache_bytes: usize = caches
        .iter()
        .map(|cache| 2 * cache.kv_heads * cache.head_dim * compiled.sizes.max_seq_len * compiled.sizes.max_batch_size)
        .sum::<usize>()
        * compiled.dtype.bits()
        / 8;
    json!({
        "name": passed.network.name, "nodes": passed.network.nodes.len(), "weight_bytes": weights,
        "cache_bytes": cache_bytes, "rtx_build_memory_bytes": rtx, "weights": tensors,
    })
}
