//! What `build`, `plan` and `eval` have in common of reports on quality: measuring, writing the page, holding the bound.
use super::build::{name, search};
use crate::cli::QualityArgs;
use crate::compile::{Compiled, Request, compile};
use crate::failure::{Exit, Failure};
use crate::quality::{self, Layer, Page, Scheme};
use crate::report::Printer;
use serde_json::{Value, json};
use std::path::Path;

/// Layers that a failure names.
const NAMED: usize = 5;

/// Refuses a report that could not be written, before the work for it is done.
pub(super) fn check_place(report: Option<&Path>) -> Result<(), Failure> {
    let Some(report) = report else { return Ok(()) };
    let folder = report.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() || report.is_dir() {
        let message = format!("`{}` cannot be written: it is a folder, or lies in none", report.display());
        return Err(Failure::new(Exit::Environment, message).hint(Some("--report takes the path of a file".into())));
    }
    Ok(())
}

/// Finds the vectors of a compiled model, and measures its layers where that was asked for; the page is written and a
/// bound held. Gives the layers for the command's own JSON.
pub(super) fn search_and_measure(
    compiled: &mut Compiled,
    request: &Request,
    asked: &QualityArgs,
    printer: &Printer,
) -> Result<Option<Vec<Layer>>, Failure> {
    if asked.report.is_none() && asked.max_error.is_none() {
        search(compiled, printer)?;
        return Ok(None);
    }
    let layers = if compiled.tp > 1 {
        // Ranks hold parts of layers; errors are of the whole.
        let whole = Request { tp: 1, dump: None, ..request.clone() };
        let mut whole = compile(&whole, &super::build::quiet_options())?;
        search(&mut whole, printer)?;
        let layers = measure(&mut whole, request, printer)?;
        compiled.take_vectors(whole);
        layers
    } else {
        search(compiled, printer)?;
        measure(compiled, request, printer)?
    };
    let scheme = scheme(compiled, request.quant.clone(), layers);
    if let Some(report) = &asked.report {
        write(report, &page(compiled, request, None, std::slice::from_ref(&scheme)), printer)?;
    }
    let layers = scheme.layers;
    if !printer.is_json() {
        printer.data(&quality::table(&layers, printer.is_verbose()));
        printer.data(&quality::meaning(&layers));
    }
    if let Some(bound) = asked.max_error {
        hold(&layers, bound, request, compiled, printer)?;
    }
    Ok(Some(layers))
}

/// Errors of a whole model's layers.
pub(super) fn measure(compiled: &mut Compiled, request: &Request, printer: &Printer) -> Result<Vec<Layer>, Failure> {
    if let Some(statistics) = &request.calibration {
        compiled.open_statistics(statistics)?;
    }
    let bar = printer.progress("Measuring", "layers", 1);
    let layers = quality::measure(compiled, &|done, total| bar.set(done, total))?;
    printer.finish(bar, "Measuring", &format!("{} layers", layers.len()));
    Ok(layers)
}

pub(super) fn scheme(compiled: &Compiled, name: String, layers: Vec<Layer>) -> Scheme {
    let chosen = [("language", &compiled.chosen.language), ("vision", &compiled.chosen.vision)];
    let recipes = chosen.into_iter().filter_map(|(part, text)| Some((part, text.clone()?))).collect();
    Scheme { name, layers, recipes }
}

/// Figures of a whole model under several schemes: heads, and a row for each.
pub(super) type WholeModel = (Vec<&'static str>, Vec<Vec<String>>);

pub(super) fn page(compiled: &Compiled, request: &Request, scores: Option<WholeModel>, schemes: &[Scheme]) -> String {
    let mut facts = vec![("type", compiled.dtype.to_string())];
    if let Some(statistics) = compiled.statistics() {
        facts.push(("statistics", format!("{} samples", statistics.header.samples)));
    }
    Page { model: &name(&request.model), facts, scores, schemes }.to_html()
}

/// Writes the page beside its place first, so that no half of it is ever there.
pub(super) fn write(report: &Path, html: &str, printer: &Printer) -> Result<(), Failure> {
    let mut new = report.as_os_str().to_owned();
    new.push(".new");
    let written = std::fs::write(&new, html).and_then(|()| std::fs::rename(&new, report));
    written.map_err(|error| {
        let _ = std::fs::remove_file(&new);
        let mut failure = Failure::new(Exit::Environment, format!("cannot write `{}`", report.display()));
        failure.causes.push(error.to_string());
        failure
    })?;
    printer.status("Reporting", &report.display().to_string());
    Ok(())
}

fn hold(
    layers: &[Layer],
    bound: f64,
    request: &Request,
    compiled: &Compiled,
    printer: &Printer,
) -> Result<(), Failure> {
    let beyond = quality::exceeding(layers, bound);
    if beyond.is_empty() {
        return Ok(());
    }
    let (count, all) = (beyond.len(), layers.len());
    let mut failure =
        Failure::new(Exit::Gate, format!("{count} of {all} layers are off by more than --max-error {bound}"));
    for layer in beyond.iter().take(NAMED) {
        failure.causes.push(format!("`{}` ({}): {:.4}", layer.path, layer.choice(), layer.error()));
    }
    if count > NAMED {
        failure.causes.push(format!("and {} more", count - NAMED));
    }
    let failure = failure.hint(Some(hint(&beyond, &quality::bound_to(layers, &beyond), request, compiled)));
    if printer.is_json() {
        printer.json(&json!({ "schema": 1, "error": failure.to_json(), "quality": quality::json(layers) }));
        return Err(failure.told());
    }
    Err(failure)
}

/// Rules that keep the layers of each part, ready to paste; a whole recipe where the user has no file of it. Those `bound`
/// to them are kept too: with factors of their own they might be off by more than they are.
fn hint(beyond: &[&Layer], bound: &[&Layer], request: &Request, compiled: &Compiled) -> String {
    let parts = [
        ("--quant", &request.quant, "language", &compiled.chosen.language),
        ("--vision-quant", &request.vision_quant, "vision", &compiled.chosen.vision),
    ];
    let mut hints = Vec::new();
    for (flag, asked, part, chosen) in parts {
        let own: Vec<&&Layer> =
            beyond.iter().chain(bound).filter(|layer| (layer.network == "vision") == (part == "vision")).collect();
        let Some(first) = own.first() else { continue };
        let rule = |layer: &&&Layer| format!("\n[[rule]]\nmatch = \"{}\"\nformat = \"none\"", layer.path);
        let rules: String = own.iter().map(rule).collect();
        let shared = bound.iter().any(|layer| own.iter().any(|kept| std::ptr::eq(**kept, *layer)));
        let them = if shared { "them, and what shares factors with them," } else { "them" };
        let keep = format!("keep {them} as they are, with {flag} FILE.toml:\nname = \"{asked}-kept\"");
        let recipe = compiled.recipe(&first.network);
        hints.push(match chosen.as_ref().and_then(|text| text.split_once('\n')) {
            Some((_, others)) => format!("{keep}{rules}\n{}", others.trim_end()),
            None if recipe.is_preset() => format!("{keep}\nbase = \"{asked}\"{rules}"),
            None => {
                format!("keep {them} as they are, by rules before the first of the recipe `{}`:{rules}", recipe.name)
            }
        });
    }
    hints.join("\n")
}

/// The `quality` object, where layers were measured.
pub(super) fn to_json(layers: Option<&Vec<Layer>>) -> Value {
    layers.map_or(Value::Null, |layers| quality::json(layers))
}
