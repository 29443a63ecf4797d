//! `plan`: what a build would do, from headers alone.
use super::build::{check_kv_cache, compile_reported, request};
use super::{mixed, quality};
use crate::builder::{Need, parent};
use crate::cli::{PlanArgs, Target};
use crate::compile::Compiled;
use crate::failure::Failure;
use crate::passes::Passed;
use crate::report::{Printer, bytes, table};
use graphs::{Format, Weight};
use quant::Layout;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// One weight: where it comes from and what becomes of it.
struct Row {
    path: String,
    sources: Vec<String>,
    stored: String,
    bytes: u64,
    note: Option<String>,
}

pub fn run(args: &PlanArgs, printer: &Printer) -> Result<(), Failure> {
    check_kv_cache(&args.options)?;
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
    let (mut needs, mut largest) = (Vec::new(), 0);
    let wants = |target| args.options.target.contains(&target);
    for passed in &compiled.networks {
        let rows = rows(&compiled, passed)?;
        let weights: u64 = rows.iter().map(|row| row.bytes).sum();
        let stored: BTreeMap<&str, u64> = rows.iter().map(|row| (row.path.as_str(), row.bytes)).collect();
        let stored = |weight: &Weight| stored.get(weight.key().as_str()).copied().unwrap_or(0);
        let need = match args.options.target {
            _ if wants(Target::Tensorrt) => Some(Need::tensorrt(&passed.network, &stored)),
            _ if wants(Target::Rtx) => Some(Need::rtx(&passed.network, &stored)),
            _ => None,
        };
        needs.extend(need);
        largest = rows.iter().map(|row| row.bytes).fold(largest, u64::max);
        summary.push(vec![
            passed.label(),
            formats(passed),
            rows.len().to_string(),
            bytes(weights),
            need.map_or_else(|| "-".into(), |need| bytes(need.own)),
        ]);
        networks.push(network_json(&compiled, passed, &rows, weights, need));
        let line = |row: Row| vec![row.path, row.stored, bytes(row.bytes), row.note.unwrap_or_default()];
        lines.extend(rows.into_iter().map(line));
    }
    let (sizes, jobs) = (compiled.sizes, args.jobs.min(needs.len().max(1)));
    let (need, parent) = (Need::side_by_side(needs, jobs), parent(largest));
    if printer.is_json() {
        let ignored = &compiled.source.coverage().ignored;
        printer.json(&json!({
            "schema": 1, "model": args.options.model, "dtype": compiled.dtype, "sizes": sizes,
            "quantization": compiled.quantization, "recipes": compiled.chosen, "networks": networks, "ignored": ignored,
            "quality": quality::to_json(layers.as_ref()),
            "jobs": jobs, "peak_own_memory_bytes": need.own, "peak_resident_memory_bytes": need.resident,
            "parent_memory_bytes": parent,
        }));
        return Ok(());
    }
    if printer.is_verbose() {
        printer.data(&table(&["weight", "stored as", "bytes", "note"], &lines));
    }
    printer.data(&table(&["network", "formats", "weights", "bytes", "build memory"], &summary));
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
    let together = if jobs > 1 { format!("; {jobs} engines side by side") } else { String::new() };
    printer.data(&format!(
        "building takes at most {} of memory{together}, and {} of pages of weights and code that the system can take back",
        bytes(need.own + parent),
        bytes(need.resident - need.own)
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

/// `int4_g128 x 224, plain x 1` over the linear layers.
fn formats(passed: &Passed) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for choice in &passed.assignments {
        let name = choice.format.as_ref().map_or_else(|| passed.network.dtype.name().to_owned(), Format::to_string);
        *counts.entry(name).or_default() += 1;
    }
    counts.iter().map(|(name, count)| format!("{name} x {count}")).collect::<Vec<_>>().join(", ")
}

fn network_json(compiled: &Compiled, passed: &Passed, rows: &[Row], weights: u64, need: Option<Need>) -> Value {
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
        .map(|cache| cache.token_bytes(compiled.dtype) * compiled.sizes.max_seq_len * compiled.sizes.max_batch_size)
        .sum();
    json!({
        "name": passed.network.name, "nodes": passed.network.nodes.len(), "weight_bytes": weights,
        "cache_bytes": cache_bytes, "build_memory_bytes": need.map(|need| need.own),
        "build_resident_memory_bytes": need.map(|need| need.resident), "weights": tensors,
    })
}
