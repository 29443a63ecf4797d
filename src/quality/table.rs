//! The report for terminals and for programs.
use super::heat::place;
use super::{Basis, Factors, Layer};
use crate::report;
use serde_json::{Value, json};

/// One line for each projection of a network, or with `all` for each layer.
pub fn table(layers: &[Layer], all: bool) -> String {
    if all {
        let row = |layer: &Layer| {
            vec![
                format!("{}: {}", layer.network, layer.path),
                layer.choice(),
                error(layer.error()),
                basis(layer.basis),
                report::bytes(layer.bytes_before),
                report::bytes(layer.bytes_after),
                why(layer),
            ]
        };
        let head = ["layer", "format", "error", "of", "before", "after", "why"];
        return report::table(&head, &layers.iter().map(row).collect::<Vec<_>>());
    }
    let mut groups: Vec<(String, Vec<&Layer>)> = Vec::new();
    for layer in layers {
        let (prefix, _, column) = place(&layer.path);
        let name = match prefix.as_str() {
            "" => format!("{}: {}", layer.network, layer.path),
            _ => format!("{}: {prefix}.*.{column}", layer.network),
        };
        match groups.iter_mut().find(|(known, _)| *known == name) {
            Some((_, members)) => members.push(layer),
            None => groups.push((name, vec![layer])),
        }
    }
    let row = |(name, members): (String, Vec<&Layer>)| {
        let mut choices: Vec<String> = members.iter().map(|layer| layer.choice()).collect();
        choices.sort_unstable();
        choices.dedup();
        let sum = |of: fn(&Layer) -> u64| report::bytes(members.iter().map(|layer| of(layer)).sum());
        let mean = members.iter().map(|layer| layer.error()).sum::<f64>() / members.len().max(1) as f64;
        let worst = members.iter().max_by(|a, b| a.error().total_cmp(&b.error()));
        let worst_row = worst.map(|layer| place(&layer.path).1.to_string()).filter(|_| members.len() > 1);
        vec![
            name,
            members.len().to_string(),
            choices.join(", "),
            error(mean),
            worst.map_or_else(String::new, |layer| error(layer.error())),
            worst_row.unwrap_or_default(),
            sum(|layer| layer.bytes_before),
            sum(|layer| layer.bytes_after),
        ]
    };
    let rows: Vec<Vec<String>> = groups.into_iter().map(row).collect();
    report::table(&["layers", "count", "format", "mean error", "largest", "at", "before", "after"], &rows)
}

/// Which errors these are, in a sentence.
pub fn meaning(layers: &[Layer]) -> String {
    let count = |wanted: fn(&Basis) -> bool| layers.iter().filter(|layer| wanted(&layer.basis)).count();
    let (products, weights) = (count(|basis| matches!(basis, Basis::Outputs { .. })), count(|b| *b == Basis::Weights));
    let rows = layers.iter().find_map(|layer| match layer.basis {
        Basis::Outputs { rows } => Some(rows),
        _ => None,
    });
    match (rows, weights) {
        (None, 0) => "all layers are as the checkpoint has them".into(),
        (None, _) => {
            "relative errors of the weights themselves (there are no statistics of what the layers read)".into()
        }
        (Some(rows), 0) => format!("relative errors of the layers' outputs for {rows} rows of the statistics"),
        (Some(rows), _) => format!(
            "relative errors of {products} layers' outputs for {rows} rows of the statistics, of {weights} layers' weights \
             where these have none"
        ),
    }
}

/// Four places for small errors, as they are to be compared.
pub(super) fn error(error: f64) -> String {
    if error == 0.0 { "0".into() } else { format!("{error:.4}") }
}

pub(super) fn basis(basis: Basis) -> String {
    match basis {
        Basis::Exact => "exact".into(),
        Basis::Outputs { rows } => format!("outputs, {rows} rows"),
        Basis::Weights => "weights".into(),
    }
}

pub(super) fn why(layer: &Layer) -> String {
    let factors = match layer.factors {
        Factors::None => None,
        Factors::Folded => Some("factors folded".to_owned()),
        Factors::Explicit => Some("factors in an op of their own".to_owned()),
    };
    let parts = std::iter::once(layer.reason.clone()).chain(layer.note.clone()).chain(factors);
    parts.collect::<Vec<_>>().join("; ")
}

/// The `quality` object of a command's JSON.
pub fn json(layers: &[Layer]) -> Value {
    let layer = |layer: &Layer| {
        let (basis, rows) = match layer.basis {
            Basis::Exact => ("exact", None),
            Basis::Outputs { rows } => ("outputs", Some(rows)),
            Basis::Weights => ("weights", None),
        };
        let factors = match layer.factors {
            Factors::None => None,
            Factors::Folded => Some("folded"),
            Factors::Explicit => Some("explicit"),
        };
        json!({
            "network": layer.network, "path": layer.path, "shape": [layer.outputs, layer.inputs],
            "format": layer.choice(), "reason": layer.reason, "note": layer.note, "factors": factors,
            "relative_error": layer.error(), "error_of": basis, "rows": rows,
            "bytes_before": layer.bytes_before, "bytes_after": layer.bytes_after,
        })
    };
    let sum = |of: fn(&Layer) -> u64| layers.iter().map(of).sum::<u64>();
    let worst = layers.iter().max_by(|a, b| a.error().total_cmp(&b.error()));
    json!({
        "largest_relative_error": worst.map(Layer::error), "worst_layer": worst.map(|layer| &layer.path),
        "bytes_before": sum(|layer| layer.bytes_before), "bytes_after": sum(|layer| layer.bytes_after),
        "layers": layers.iter().map(layer).collect::<Vec<_>>(),
    })
}
