//! Layers as a map: where a path repeats under numbers, the numbers are rows and what follows them columns.
use super::Layer;
use std::collections::BTreeMap;

/// Layers of one network whose paths begin alike.
pub(super) struct Map<'l> {
    pub(super) network: &'l str,
    /// What is before the number; empty for layers without one.
    pub(super) prefix: String,
    /// In the order of the network.
    pub(super) columns: Vec<String>,
    /// By number, or by path where there is none.
    pub(super) rows: BTreeMap<Row, Vec<Option<&'l Layer>>>,
}

/// Numbers come in their order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Row {
    Number(Vec<u64>),
    Path(String),
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Row::Number(numbers) => f.write_str(&numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(".")),
            Row::Path(path) => f.write_str(path),
        }
    }
}

/// A path's prefix, row and column.
pub(super) fn place(path: &str) -> (String, Row, String) {
    let parts: Vec<&str> = path.split('.').collect();
    let number = |at: usize| parts.get(at).and_then(|part| part.parse::<u64>().ok());
    let Some((at, first)) = (0..parts.len()).find_map(|at| Some((at, number(at)?))) else {
        return (String::new(), Row::Path(path.to_owned()), String::new());
    };
    // Stages of blocks have two numbers.
    let second = number(at + 2).filter(|_| parts.get(at + 1) == Some(&"blocks"));
    let rest = if second.is_some() { at + 3 } else { at + 1 };
    let numbers = std::iter::once(first).chain(second).collect();
    (parts[..at].join("."), Row::Number(numbers), parts.get(rest..).unwrap_or_default().join("."))
}

pub(super) fn maps(layers: &[Layer]) -> Vec<Map<'_>> {
    let mut maps: Vec<Map> = Vec::new();
    for layer in layers {
        let (prefix, row, column) = place(&layer.path);
        let network = layer.network.as_str();
        let found = maps.iter().position(|map| map.network == network && map.prefix == prefix);
        let at = found.unwrap_or_else(|| {
            maps.push(Map { network, prefix, columns: Vec::new(), rows: BTreeMap::new() });
            maps.len() - 1
        });
        let Map { columns, rows, .. } = &mut maps[at];
        let at = columns.iter().position(|known| *known == column).unwrap_or_else(|| {
            columns.push(column);
            columns.len() - 1
        });
        let row = rows.entry(row).or_default();
        row.resize(row.len().max(at + 1), None);
        row[at] = Some(layer);
    }
    for map in &mut maps {
        let width = map.columns.len();
        map.rows.values_mut().for_each(|row| row.resize(width, None));
    }
    maps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let of = |path: &str| {
            let (prefix, row, column) = place(path);
            (prefix, row.to_string(), column)
        };
        let text = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        assert_eq!(of("model.layers.3.mlp.down_proj"), text("model.layers", "3", "mlp.down_proj"));
        assert_eq!(of("decoder.block.11.layer.1.wo"), text("decoder.block", "11", "layer.1.wo"));
        assert_eq!(of("encoder.layers.2.blocks.10.query"), text("encoder.layers", "2.10", "query"));
        assert_eq!(of("lm_head"), text("", "lm_head", ""));
        assert!(place("a.2.x").1 < place("a.10.x").1, "by number");
    }
}
