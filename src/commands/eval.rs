//! `eval`: what quantization costs, on the reference.
use super::build::{compile_reported, search};
use super::{mixed, quality};
use crate::cli::{EvalCommand, EvalPicturesArgs, EvalTextArgs};
use crate::compile::{Chosen, Compiled, KvCache, Request};
use crate::engine_dir::{EngineConfig, SizeRequest};
use crate::failure::{Exit, Failure};
use crate::processor::{Picture, Processor};
use crate::quality::Scheme;
use crate::report::{Printer, table};
use crate::runtime::{AnswerOptions, Ask, Reference, Session};
use crate::samples::{Sample, Sampler, windows};
use crate::score::{Baseline, Divergence, Scores, score};
use crate::source::CheckpointValues;
use crate::teach::Lesson;
use graphs::Logits;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Name of the recipe that others are compared with.
const UNQUANTIZED: &str = "none";

pub fn run(command: &EvalCommand, printer: &Printer) -> Result<(), Failure> {
    match command {
        EvalCommand::Text(args) => text(args, printer),
        EvalCommand::Pictures(args) => pictures(args, printer),
    }
}

fn request(model: &str, dtype: Option<graphs::DType>, calibration: Option<&PathBuf>) -> Request {
    Request {
        model: model.to_owned(),
        language: None,
        vision_tower: None,
        tokenizer: None,
        dtype,
        quant: UNQUANTIZED.to_owned(),
        vision_quant: UNQUANTIZED.to_owned(),
        chosen: Chosen::default(),
        calibration: calibration.cloned(),
        kv_cache: KvCache::Auto,
        tp: 1,
        divide_embedding: true,
        sizes: SizeRequest { max_batch_size: 1, ..SizeRequest::default() },
        logits: Logits::All,
        dump: None,
        marks: Vec::new(),
    }
}

/// Compiles, with all vectors found.
fn compiled(request: &Request, printer: &Printer) -> Result<Compiled, Failure> {
    let mut compiled = compile_reported(request, printer)?;
    search(&mut compiled, printer)?;
    Ok(compiled)
}

/// What a model's prompts are made by.
pub(super) fn sampler_config(compiled: &Compiled) -> EngineConfig {
    let quantization = compiled.quantization_config();
    EngineConfig::new(&compiled.source.model, compiled.dtype, quantization, 1, compiled.sizes)
}

pub(super) fn lesson<'c>(compiled: &'c Compiled, processor: &Processor) -> Lesson<'c> {
    let facts = compiled.source.facts();
    let image = processor.image.clone();
    let image = image.map(|image| facts.pictures.map_or(image.clone(), |pictures| image.with_aspect(pictures.aspect)));
    Lesson { networks: compiled.networks.iter().map(|passed| &passed.network).collect(), facts, image }
}

/// Scores of samples under one model; the first writes the baseline.
fn scores(
    compiled: &Compiled,
    processor: &Processor,
    samples: &[Sample],
    baseline: &mut Baseline,
    printer: &Printer,
) -> Result<Scores, Failure> {
    let values = CheckpointValues { source: compiled, compute: compiled.dtype };
    let bar = printer.progress("Scoring", "samples", samples.len() as u64);
    let progress = |done, total| bar.set(done, total);
    Ok(score(&lesson(compiled, processor), &values, samples, baseline, &progress)?)
}

pub(super) fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    let path = path.to_path_buf();
    move |error| {
        let mut failure = Failure::new(Exit::Refused, format!("cannot read `{}`", path.display()));
        failure.causes.push(error.to_string());
        failure
    }
}

const TEXT_HEAD: [&str; 5] = ["quantization", "perplexity", "KL divergence", "median", "99 %"];

/// As the last columns of both heads; `digits` are the mean's.
fn cells(divergence: Divergence, digits: usize) -> [String; 3] {
    let Divergence { mean, median, percentile_99 } = divergence;
    [format!("{mean:.digits$}"), format!("{median:.1e}"), format!("{percentile_99:.1e}")]
}

/// The layers of one scheme for a report, where one is written.
fn measured(
    compiled: &mut Compiled,
    request: &Request,
    wanted: bool,
    printer: &Printer,
) -> Result<Option<Scheme>, Failure> {
    if !wanted {
        return Ok(None);
    }
    let layers = quality::measure(compiled, request, printer)?;
    Ok(Some(quality::scheme(compiled, request.quant.clone(), layers)))
}

/// Perplexity: windows of tokens that see each other, the mean over every token but a window's first.
fn text(args: &EvalTextArgs, printer: &Printer) -> Result<(), Failure> {
    quality::check_place(args.report.as_deref())?;
    let prose = std::fs::read_to_string(&args.text).map_err(unreadable(&args.text))?;
    let request = request(&args.model, args.dtype.0, args.calibration.as_ref());
    let plain = compiled(&request, printer)?;
    if plain.networks.iter().all(|passed| passed.network.name != "language") {
        return Err(Failure::new(Exit::Refused, "the model has no language network"));
    }
    let processor = Processor::open_parts(&plain.source.folders())?;
    let tokens: Vec<i32> = processor.text.encode(&prose, true)?.iter().map(|&token| token as i32).collect();
    let tokens = &tokens[..tokens.len().min(args.tokens)];
    let window = args.window;
    if window < 2 || tokens.len() < window {
        let message = format!("the text has {} tokens, a window takes {window}", tokens.len());
        return Err(Failure::new(Exit::Refused, message).hint(Some("use a smaller --window of at least 2".into())));
    }
    let samples = windows(tokens, window);
    let mut baseline = Baseline::new()?;
    let of_plain = scores(&plain, &processor, &samples, &mut baseline, printer)?;
    let mut rows = Vec::new();
    let mut results = Vec::new();
    let mut schemes = Vec::new();
    for quant in &args.quant {
        let found = if quant == UNQUANTIZED && args.kv_cache == KvCache::Auto {
            of_plain
        } else {
            let request = Request { quant: quant.clone(), kv_cache: args.kv_cache, ..request.clone() };
            let request = mixed::resolve(&request, printer)?;
            let mut compiled = compiled(&request, printer)?;
            let found = scores(&compiled, &processor, &samples, &mut baseline, printer)?;
            schemes.extend(measured(&mut compiled, &request, args.report.is_some(), printer)?);
            found
        };
        let Scores { perplexity, divergence, .. } = found;
        let mut row = vec![quant.clone(), format!("{perplexity:.3}")];
        row.extend(cells(divergence, 5));
        rows.push(row);
        results.push(json!({
            "quant": quant, "perplexity": perplexity, "divergence": divergence.mean, "divergence_median": divergence.median,
            "divergence_99_percent": divergence.percentile_99, "tokens": tokens.len(), "window": window,
        }));
    }
    if printer.is_json() {
        printer.json(&json!({ "schema": 1, "results": results }));
    } else {
        printer.data(&table(&TEXT_HEAD, &rows));
    }
    if let Some(report) = &args.report {
        let page = quality::page(&plain, &request, Some((TEXT_HEAD.to_vec(), rows)), &schemes);
        quality::write(report, &page, printer)?;
    }
    Ok(())
}

/// Pictures with a question and the expected answers.
pub(super) struct Task {
    prompt: String,
    /// What comes before an answer's text.
    lead: String,
    max_new_tokens: Option<usize>,
    pictures: Vec<Picture>,
    references: Vec<String>,
}

impl Task {
    pub(super) fn read(pictures: &Path, references: &Path, task: &Path) -> Result<Task, Failure> {
        let json_file = |path: &Path| -> Result<Value, Failure> {
            let text = std::fs::read(path).map_err(unreadable(path))?;
            serde_json::from_slice(&text)
                .map_err(|error| Failure::new(Exit::Refused, format!("`{}` is no JSON: {error}", path.display())))
        };
        let task = json_file(task)?;
        // A page needs no prompt, which the task must say.
        let prompt = match task.get("prompt") {
            Some(Value::Null) => Some(String::new()),
            Some(found) => found.as_str().filter(|prompt| !prompt.is_empty()).map(str::to_owned),
            None => None,
        };
        let lead = task.get("lead").and_then(Value::as_str).unwrap_or_default().to_owned();
        let max_new_tokens = task.get("maxtok").and_then(Value::as_u64).map(|count| count as usize);
        let references = json_file(references)?;
        let references = references.as_array().into_iter().flatten().filter_map(Value::as_str);
        let references: Vec<String> = references.map(str::to_owned).collect();
        let pictures = picture_file(pictures)?;
        let fits = references.len() == pictures.len() && !pictures.is_empty();
        let Some(prompt) = prompt.clone().filter(|_| fits) else {
            let (pictures, references, prompt) = (pictures.len(), references.len(), prompt.unwrap_or_default());
            let message = format!("{pictures} pictures, {references} references, prompt `{prompt}`");
            return Err(Failure::new(Exit::Refused, message)
                .hint(Some("pictures and references must be as many, and the task must hold a prompt".into())));
        };
        Ok(Task { prompt, lead, max_new_tokens, pictures, references })
    }

    /// The first of them with their answers.
    pub(super) fn samples(&self, sampler: &Sampler<'_>, limit: usize) -> Result<Vec<Sample>, Failure> {
        let pairs = std::iter::zip(&self.pictures, &self.references).take(limit);
        let sample = |(picture, reference): (&Picture, &String)| {
            let answer = format!("{}{reference}", self.lead);
            sampler.asked(vec![picture.clone()], &self.prompt, &answer).map_err(Failure::from)
        };
        pairs.map(sample).collect()
    }
}

const PICTURES_HEAD: [&str; 7] =
    ["quantization", "exact match %", "character errors %", "perplexity", "KL divergence", "median", "99 %"];

/// Exact match and character error rate of greedy answers; the likelihood of the expected ones, and how far the
/// distributions along them are from the unquantized model's.
fn pictures(args: &EvalPicturesArgs, printer: &Printer) -> Result<(), Failure> {
    quality::check_place(args.report.as_deref())?;
    let task = Task::read(&args.pictures, &args.references, &args.task)?;
    let count = task.pictures.len().min(args.limit.unwrap_or(usize::MAX));
    let request = request(&args.model, args.dtype.0, args.calibration.as_ref());
    let plain = compiled(&request, printer)?;
    let processor = Processor::open_parts(&plain.source.folders())?;
    let config = sampler_config(&plain);
    let samples = task.samples(&Sampler { processor: &processor, config: &config, window: 2 }, count)?;
    let mut baseline = Baseline::new()?;
    let of_plain = scores(&plain, &processor, &samples, &mut baseline, printer)?;
    let mut rows = Vec::new();
    let mut results = Vec::new();
    let mut schemes = Vec::new();
    for quant in &args.quant {
        let (quant_text, vision_quant) = (quant.clone(), args.vision_quant.clone());
        let request = Request { quant: quant_text, vision_quant, kv_cache: args.kv_cache, ..request.clone() };
        let request = mixed::resolve(&request, printer)?;
        let mut found = compiled(&request, printer)?;
        let unquantized = quant == UNQUANTIZED && args.vision_quant == UNQUANTIZED && args.kv_cache == KvCache::Auto;
        let scored = if unquantized { of_plain } else { scores(&found, &processor, &samples, &mut baseline, printer)? };
        if !unquantized {
            schemes.extend(measured(&mut found, &request, args.report.is_some(), printer)?);
        }
        let mut answering = compile_reported(&Request { logits: Logits::Last, ..request }, printer)?;
        answering.take_vectors(found);
        let mut session = session(&answering)?;
        let bar = printer.progress("Answering", quant, count as u64);
        let (mut exact, mut wrong, mut characters) = (0, 0, 0);
        for (number, (picture, reference)) in std::iter::zip(&task.pictures, &task.references).take(count).enumerate() {
            let ask = Ask { prompt: &task.prompt, pictures: std::slice::from_ref(picture) };
            let options = AnswerOptions { max_new_tokens: task.max_new_tokens, chat: false };
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
        let Scores { perplexity, divergence, .. } = scored;
        let mut row = vec![quant.clone(), format!("{exact:.1}"), format!("{errors:.2}"), format!("{perplexity:.4}")];
        row.extend(cells(divergence, 6));
        rows.push(row);
        results.push(json!({
            "quant": quant, "pictures": count, "exact_match_percent": exact, "character_error_percent": errors,
            "perplexity": perplexity, "divergence": divergence.mean, "divergence_median": divergence.median,
            "divergence_99_percent": divergence.percentile_99,
        }));
    }
    if printer.is_json() {
        printer.json(&json!({ "schema": 1, "results": results }));
    } else {
        printer.data(&table(&PICTURES_HEAD, &rows));
    }
    if let Some(report) = &args.report {
        let page = quality::page(&plain, &request, Some((PICTURES_HEAD.to_vec(), rows)), &schemes);
        quality::write(report, &page, printer)?;
    }
    Ok(())
}

/// A model on the reference, straight from its checkpoint.
fn session(compiled: &Compiled) -> Result<Session, Failure> {
    let config = sampler_config(compiled);
    let values = CheckpointValues { source: compiled, compute: compiled.dtype };
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
}
