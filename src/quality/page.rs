//! The report as one page of HTML that needs nothing else: no script, no font, no style from elsewhere.
use super::heat::{Map, maps};
use super::table::{basis, error, meaning, why};
use super::{Basis, Layer};
use crate::report;
use std::fmt::Write;

const STYLE: &str = include_str!("page.css");

/// Errors from which on a cell is darker.
const STEPS: [f64; 7] = [0.001, 0.005, 0.01, 0.03, 0.06, 0.12, 0.25];

/// Layers under one quantization.
pub struct Scheme {
    pub name: String,
    pub layers: Vec<Layer>,
    /// Texts of recipes that were chosen for the model, with the part that each is for.
    pub recipes: Vec<(&'static str, String)>,
}

pub struct Page<'p> {
    pub model: &'p str,
    /// Names and values: the type, the statistics.
    pub facts: Vec<(&'static str, String)>,
    /// Figures of the whole model under each scheme, with their heads, where they were measured.
    pub scores: Option<(Vec<&'static str>, Vec<Vec<String>>)>,
    pub schemes: &'p [Scheme],
}

/// Text as it may stand in HTML, quoted attributes too.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe += "&amp;",
            '<' => safe += "&lt;",
            '>' => safe += "&gt;",
            '"' => safe += "&quot;",
            '\'' => safe += "&#39;",
            other => safe.push(other),
        }
    }
    safe
}

impl Page<'_> {
    pub fn to_html(&self) -> String {
        let mut html = String::new();
        let title = format!("Quality of {}", escape(self.model));
        html += "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n";
        html += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n";
        html += &format!("<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n");
        let facts = self.facts.iter().map(|(name, value)| format!("{name}: {}", escape(value)));
        html += &format!("<p>{}</p>\n", facts.collect::<Vec<_>>().join(" · "));
        match &self.scores {
            Some((head, rows)) => {
                html += "<h2>The whole model</h2>\n";
                html += &plain(head, rows);
            }
            None => {
                html += "<p>Perplexity, divergence and scores of the whole model were not measured here: <code>trtvlm eval \
                         --report</code> does.</p>\n";
            }
        }
        self.schemes.iter().for_each(|scheme| html += &of_scheme(scheme));
        html + "</body>\n</html>\n"
    }
}

fn of_scheme(scheme: &Scheme) -> String {
    let layers = &scheme.layers;
    let sum = |of: fn(&Layer) -> u64| layers.iter().map(of).sum::<u64>();
    let mut html = format!("<h2>{}</h2>\n", escape(&scheme.name));
    let (before, after) = (sum(|layer| layer.bytes_before), sum(|layer| layer.bytes_after));
    html += &format!(
        "<p>{} linear layers, {} before, {} after; {}.</p>\n",
        layers.len(),
        report::bytes(before),
        report::bytes(after),
        escape(&meaning(layers))
    );
    for (part, text) in &scheme.recipes {
        html +=
            &format!("<details><summary>Recipe of the {part} part</summary>\n<pre>{}</pre></details>\n", escape(text));
    }
    let maps = maps(layers);
    maps.iter().for_each(|map| html += &heat(map));
    let rows: Vec<Vec<String>> = layers.iter().map(line).collect();
    let head = ["layer", "format", "error", "error of", "before", "after", "why"];
    html + &format!("<details><summary>All layers</summary>\n{}</details>\n", plain(&head, &rows))
}

fn line(layer: &Layer) -> Vec<String> {
    vec![
        format!("{}: {}", layer.network, layer.path),
        layer.choice(),
        error(layer.error()),
        basis(layer.basis),
        report::bytes(layer.bytes_before),
        report::bytes(layer.bytes_after),
        why(layer),
    ]
}

/// A table of texts; what begins with a digit is aligned as a number.
fn plain(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut html = String::from("<div class=\"wide\"><table>\n<thead><tr>");
    head.iter().for_each(|head| html += &format!("<th>{}</th>", escape(head)));
    html += "</tr></thead>\n<tbody>\n";
    for row in rows {
        html += "<tr>";
        for cell in row {
            let class = if cell.starts_with(|first: char| first.is_ascii_digit()) { " class=\"n\"" } else { "" };
            html += &format!("<td{class}>{}</td>", escape(cell));
        }
        html += "</tr>\n";
    }
    html + "</tbody></table></div>\n"
}

/// Errors by colour and number; format and bytes below, everything in the title.
fn heat(map: &Map<'_>) -> String {
    let place = match map.prefix.as_str() {
        "" => format!("{}: other layers", map.network),
        prefix => format!("{}: {prefix}.N", map.network),
    };
    let mut html = format!(
        "<h3>{}</h3>\n<div class=\"wide\"><table>\n<caption>Relative error, format and bytes of each layer</caption>\n\
         <thead><tr><th scope=\"col\">{}</th>",
        escape(&place),
        if map.prefix.is_empty() { "layer" } else { "N" }
    );
    let head = |column: &String| escape(if column.is_empty() { "error" } else { column });
    map.columns.iter().for_each(|column| html += &format!("<th scope=\"col\">{}</th>", head(column)));
    html += "</tr></thead>\n<tbody>\n";
    for (row, cells) in &map.rows {
        html += &format!("<tr><th scope=\"row\">{}</th>", escape(&row.to_string()));
        cells.iter().for_each(|cell| html += &cell.map_or_else(|| "<td></td>".to_owned(), cell_of));
        html += "</tr>\n";
    }
    html + "</tbody></table></div>\n"
}

fn cell_of(layer: &Layer) -> String {
    let step = STEPS.iter().filter(|step| layer.error() >= **step).count();
    let shown = if layer.basis == Basis::Exact { "exact".into() } else { error(layer.error()) };
    let mut title = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        title,
        "{}: error {} ({}); {}; {} to {}; {}",
        layer.path,
        shown,
        basis(layer.basis),
        layer.choice(),
        report::bytes(layer.bytes_before),
        report::bytes(layer.bytes_after),
        why(layer)
    );
    format!(
        "<td class=\"c e{step}\" title=\"{}\">{}<small>{}</small><small>{}</small></td>",
        escape(&title),
        escape(&shown),
        escape(&layer.choice()),
        report::bytes(layer.bytes_after)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quality::Factors;
    use graphs::Format;
    use quant::{Deviation, Method};

    fn layer(path: &str, off: f64) -> Layer {
        Layer {
            network: "language".into(),
            path: path.into(),
            outputs: 4,
            inputs: 64,
            reads: None,
            format: Some(Format::Int4 { group: 32 }),
            method: Method::Awq,
            reason: "rule 0 `**`".into(),
            note: None,
            factors: Factors::Folded,
            basis: Basis::Outputs { rows: 7 },
            deviation: Deviation { off, whole: 1.0 },
            bytes_before: 512,
            bytes_after: 144,
        }
    }

    #[test]
    fn nothing_from_a_checkpoint_is_markup() {
        let evil = "</title><script>alert(1)</script>\"'&";
        let layers = vec![layer(&format!("model.0.{evil}"), 0.01), layer(evil, 0.0)];
        let recipes = vec![("language", evil.to_owned())];
        let schemes = [Scheme { name: evil.into(), layers, recipes }];
        let scores = Some((vec!["quantization"], vec![vec![evil.to_owned()]]));
        let html = Page { model: evil, facts: vec![("type", evil.into())], scores, schemes: &schemes }.to_html();
        assert!(!html.contains("<script") && !html.contains("\"'&"), "{html}");
        let tags: Vec<&str> = html.split('<').skip(1).map(|tag| tag.split(['>', ' ']).next().unwrap()).collect();
        let known = "!DOCTYPE html head meta title style body h1 h2 h3 p div table caption thead tbody tr th td small \
                     details summary pre code";
        let known: Vec<&str> = known.split_whitespace().collect();
        assert!(tags.iter().all(|tag| known.contains(&tag.trim_start_matches('/'))), "{tags:?}");
        for tag in known.iter().filter(|tag| !["!DOCTYPE", "meta"].contains(tag)) {
            let count = |tag: String| tags.iter().filter(|found| **found == tag).count();
            assert_eq!(count((*tag).to_owned()), count(format!("/{tag}")), "{tag}");
        }
        assert!(["http", "src=", "url(", "@import", "<link"].into_iter().all(|word| !html.contains(word)));
    }

    #[test]
    fn a_cell_says_all_without_its_colour() {
        let cell = cell_of(&layer("model.3.mlp.up", 0.0025));
        assert!(
            cell.starts_with(
                "<td class=\"c e4\" title=\"model.3.mlp.up: error 0.0500 (outputs, 7 rows); int4-awq g32;"
            )
        );
        assert!(cell.contains("512 B to 144 B; rule 0 `**`; factors folded\">0.0500<small>int4-awq g32</small>"));
    }
}
