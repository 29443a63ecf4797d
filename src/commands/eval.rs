//! `eval`: what quantization costs, on the reference.
use super::build::compile_reported;
use crate::cli::{EvalCommand, EvalPicturesArgs, EvalTextArgs};
use crate::compile::{Compiled, Request};
use crate::engine_dir::{EngineConfig, SizeRequest};
use crate::failure::{Exit, Failure};
use crate::processor::{Picture, Processor, TextProcessor};
use crate::report::{Printer, table};
use crate::runtime::{AnswerOptions, Ask, Reference, Session};
use crate::source::CheckpointValues;
use graphs::interpret::{Array, Caches, Interpreter};
use graphs::{DType, Logits};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

pub fn run(command: &EvalCommand, printer: &Printer) -> Result<(), Failure> {
    match command {
        EvalCommand::Text(args) => text(args, printer),
        EvalCommand::Pictures(args) => pictures(args, printer),
    }
}

fn compiled(
    model: &str,
    dtype: Option<DType>,
    quant: &str,
    vision_quant: &str,
    logits: Logits,
    printer: &Printer,
) -> Result<Compiled, Failure> {
    let request = Request {
        model: model.to_owned(),
        language: None,
        vision_tower: None,
        dtype,
        quant: quant.to_owned(),
        vision_quant: vision_quant.to_owned(),
        tp: 1,
        sizes: SizeRequest { max_batch_size: 1, ..SizeRequest::default() },
        logits,
        dump: None,
        marks: Vec::new(),
    };
    compile_reported(&request, printer)
}

pub(super) fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    let path = path.to_path_buf();
    move |error| {
        let mut failure = Failure::new(Exit::Refused, format!("cannot read `{}`", path.display()));
        failure.causes.push(error.to_string());
        failure
    }
}

/// Perplexity: windows of tokens that see each other, the mean over every token but a window's first.
fn text(args: &EvalTextArgs, printer: &Printer) -> Result<(), Failure> {
    let prose = std::fs::read_to_string(&args.text).map_err(unreadable(&args.text))?;
    let mut rows = Vec::new();
    let mut results = Vec::new();
    for quant in &args.quant {
        let compiled = compiled(&args.model, args.dtype.0, quant, "none", Logits::All, printer)?;
        let tokens = TextProcessor::open_parts(&compiled.source.folders())?.encode(&prose, true)?;
        let tokens: Vec<i32> = tokens.iter().take(args.tokens).map(|&token| token as i32).collect();
        if args.window < 2 || tokens.len() < args.window {
            let message = format!("the text has {} tokens, a window takes {}", tokens.len(), args.window);
            return Err(Failure::new(Exit::Refused, message).hint(Some("use a smaller --window of at least 2".into())));
        }
        let perplexity = perplexity(&compiled, &tokens, args.window, printer)?;
        rows.push(vec![quant.clone(), format!("{perplexity:.3}")]);
        results
            .push(json!({ "quant": quant, "perplexity": perplexity, "tokens": tokens.len(), "window": args.window }));
    }
    if printer.is_json() {
        printer.json(&json!({ "schema": 1, "results": results }));
    } else {
        printer.data(&table(&["quantization", "perplexity"], &rows));
    }
    Ok(())
}

fn perplexity(compiled: &Compiled, tokens: &[i32], window: usize, printer: &Printer) -> Result<f64, Failure> {
    let internal = |error: graphs::interpret::InterpretError| Failure::of(Exit::Refused, &error);
    let values = CheckpointValues { source: &compiled.source, compute: compiled.dtype };
    let language = compiled.networks.iter().find(|passed| passed.network.name == "language");
    let language = language.ok_or_else(|| Failure::new(Exit::Refused, "the model has no language network"))?;
    let interpreter = Interpreter::new(language.network.clone(), &values).map_err(internal)?;
    let hidden = compiled.source.facts().hidden;
    let (mut sum, mut count) = (0.0f64, 0usize);
    let windows = tokens.chunks_exact(window);
    let bar = printer.progress("Scoring", "text", windows.len() as u64);
    for (number, ids) in windows.enumerate() {
        let ints = |values: Vec<i32>| Array::int([1, window], values);
        let inputs = BTreeMap::from([
            ("input_ids", ints(ids.to_vec())),
            ("position_ids", ints((0..window as i32).collect())),
            ("past_lengths", Array::int([1], vec![0])),
            ("sequence_lengths", Array::int([1], vec![window as i32])),
            ("prompt_embedding_table", Array::float([1, hidden], vec![0.0; hidden])),
        ]);
        let mut caches = Caches::new(interpreter.network(), 1, window);
        let outputs = interpreter.run(&inputs, &mut caches, None).map_err(internal)?;
        let logits = outputs.get("logits").and_then(|logits| logits.floats().ok()).unwrap_or_default();
        let vocab = logits.len() / window;
        for (row, &next) in std::iter::zip(logits.chunks_exact(vocab), &ids[1..]) {
            sum += surprise(row, next as usize);
            count += 1;
        }
        bar.set(number as u64 + 1, (tokens.len() / window) as u64);
    }
    Ok((sum / count as f64).exp())
}

/// Negative log-likelihood of one token.
fn surprise(logits: &[f32], token: usize) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    sum.ln() - f64::from(logits.get(token).copied().unwrap_or(f32::NEG_INFINITY) - largest)
}

/// Exact match and character error rate of greedy answers.
fn pictures(args: &EvalPicturesArgs, printer: &Printer) -> Result<(), Failure> {
    let json_file = |path: &Path| -> Result<Value, Failure> {
        let text = std::fs::read(path).map_err(unreadable(path))?;
        serde_json::from_slice(&text)
            .map_err(|error| Failure::new(Exit::Refused, format!("`{}` is no JSON: {error}", path.display())))
    };
    let task = json_file(&args.task)?;
    // A page needs no prompt, which the task must say.
    let prompt = match task.get("prompt") {
        Some(Value::Null) => Some(""),
        Some(found) => found.as_str().filter(|prompt| !prompt.is_empty()),
        None => None,
    };
    let max_new_tokens = task.get("maxtok").and_then(Value::as_u64).map(|count| count as usize);
    let references = json_file(&args.references)?;
    let references: Vec<&str> = references.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let pictures = picture_file(&args.pictures)?;
    let count = pictures.len().min(args.limit.unwrap_or(usize::MAX));
    let fits = references.len() == pictures.len() && count > 0;
    let Some(prompt) = prompt.filter(|_| fits) else {
        let (pictures, references) = (pictures.len(), references.len());
        let message = format!("{pictures} pictures, {references} references, prompt `{}`", prompt.unwrap_or_default());
        return Err(Failure::new(Exit::Refused, message)
            .hint(Some("pictures and references must be as many, and the task must hold a prompt".into())));
    };
    let mut rows = Vec::new();
    let mut results = Vec::new();
    for quant in &args.quant {
        let compiled = compiled(&args.model, args.dtype.0, quant, &args.vision_quant, Logits::Last, printer)?;
        let mut session = session(&compiled)?;
        let bar = printer.progress("Answering", quant, count as u64);
        let (mut exact, mut wrong, mut characters) = (0, 0, 0);
        for (number, (picture, reference)) in std::iter::zip(&pictures, &references).take(count).enumerate() {
            let ask = Ask { prompt, pictures: std::slice::from_ref(picture) };
            let options = AnswerOptions { max_new_tokens, chat: false };
            let (answers, _) = session.answer(&[ask], options, &mut |_, _| {})?;
            let found = answers.first().map(|answer| answer.text.as_str()).unwrap_or_default();
            exact += usize::from(found == *reference);
            wrong += edit_distance(found, reference);
            characters += reference.chars().count();
            bar.set(number as u64 + 1, count as u64);
        }
        drop(bar);
        let exact = 100.0 * exact as f64 / count as f64;
        let errors = 100.0 * wrong as f64 / characters.max(1) as f64;
        rows.push(vec![quant.clone(), format!("{exact:.1}"), format!("{errors:.2}")]);
        results.push(json!({
            "quant": quant, "pictures": count, "exact_match_percent": exact, "character_error_percent": errors,
        }));
    }
    if printer.is_json() {
        printer.json(&json!({ "schema": 1, "results": results }));
    } else {
        printer.data(&table(&["quantization", "exact match %", "character errors %"], &rows));
    }
    Ok(())
}

/// A model on the reference, straight from its checkpoint.
fn session(compiled: &Compiled) -> Result<Session, Failure> {
    let quantization = compiled.quantization_config();
    let config = EngineConfig::new(&compiled.source.model, compiled.dtype, quantization, 1, compiled.sizes);
    let values = CheckpointValues { source: &compiled.source, compute: compiled.dtype };
    let networks = compiled.networks.iter().map(|passed| passed.network.clone()).collect();
    let reference = Reference::from_networks(networks, &values, config.clone())?;
    let processor = Processor::open_parts(&compiled.source.folders())?;
    Ok(Session::new(Box::new(reference), processor, config))
}

/// Tensor `pictures`, uint8 `[count, height, width, channels]`; one channel stands for grey.
pub(super) fn picture_file(path: &Path) -> Result<Vec<Picture>, Failure> {
    let bytes = std::fs::read(path).map_err(unreadable(path))?;
    let refuse = |reason: String| Failure::new(Exit::Refused, format!("`{}`: {reason}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).map_err(|error| refuse(error.to_string()))?;
    let tensor = file.tensor("pictures").map_err(|error| refuse(error.to_string()))?;
    let &[_, height, width, channels @ (1 | 3)] = tensor.shape() else {
        return Err(refuse(format!("`pictures` is {:?}, wanted [count, height, width, 1 or 3]", tensor.shape())));
    };
    if tensor.dtype() != safetensors::Dtype::U8 {
        return Err(refuse(format!("`pictures` holds {}, wanted U8", tensor.dtype())));
    }
    let picture = |pixels: &[u8]| {
        let rgb = if channels == 3 { pixels.to_vec() } else { pixels.iter().flat_map(|&grey| [grey; 3]).collect() };
        Picture::from_rgb(width, height, rgb)
    };
    let pictures = tensor.data().chunks_exact((height * width * channels).max(1)).map(picture);
    Ok(pictures.collect::<Result<_, _>>()?)
}

/// Levenshtein distance in characters.
fn edit_distance(found: &str, wanted: &str) -> usize {
    let wanted: Vec<char> = wanted.chars().collect();
    let mut row: Vec<usize> = (0..=wanted.len()).collect();
    for (line, character) in found.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (column, other) in wanted.iter().enumerate() {
            let replaced = diagonal + usize::from(character != *other);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[wanted.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        let cases = [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("é", "e", 1)];
        for (found, wanted, distance) in cases {
            assert_eq!(edit_distance(found, wanted), distance, "{found} {wanted}");
        }
    }

    #[test]
    fn surprise_is_the_negative_log_of_the_softmax() {
        let logits = [1.0f32, 2.0, 4.0];
        let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        assert!((surprise(&logits, 1) + (2.0f64.exp() / total).ln()).abs() < 1e-6);
    }
}
