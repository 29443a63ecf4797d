//! The TSV files behind the tables, against NVIDIA's public headers, parsed again.
//!
//! Headers are looked for in the folder that `TRTVLM_TENSORRT_HEADERS` names and in the crate sources that `cargo fetch`
//! of a throw-away package with `trtx-sys = "=0.9.1"` leaves behind. Where there are none, the test says so.
#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub, reason = "a test fails by panicking")]
mod parser;
mod tokens;

use parser::Headers;
use std::path::PathBuf;

fn roots() -> Vec<PathBuf> {
    let named = std::env::var_os("TRTVLM_TENSORRT_HEADERS").map(PathBuf::from);
    let cargo = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo = cargo.or_else(|| std::env::home_dir().map(|home| home.join(".cargo"))).unwrap_or_default();
    let registries = std::fs::read_dir(cargo.join("registry/src")).into_iter().flatten().flatten();
    let crates = registries.flat_map(|registry| std::fs::read_dir(registry.path()).into_iter().flatten().flatten());
    let fetched = crates
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("trtx-sys-"))
        .map(|entry| entry.path().join("TensorRT-Headers"))
        .filter(|folder| folder.is_dir());
    named.into_iter().chain(fetched).collect()
}

/// The column of the TSV files that these headers belong to; none for versions that are refused at run time.
fn column(headers: &Headers) -> Option<usize> {
    match (headers.rtx, headers.major, headers.minor) {
        (true, 1, 5..) => Some(2),
        (false, 10, 6 | 7 | 9..) => Some(0),
        (false, 11, _) => Some(1),
        _ => None,
    }
}

/// Whether these are the headers that a table's length was read off.
fn is_source(headers: &Headers) -> bool {
    matches!((headers.rtx, headers.major, headers.minor), (false, 10, 6) | (false, 11, 4) | (true, 1, 7))
}

fn rows(name: &str) -> Vec<Vec<String>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("slots").join(name);
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().skip(1).map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

fn slots_agree(headers: &Headers, column: usize) -> usize {
    let mut agreed = 0;
    for row in rows("methods.tsv") {
        let (class, method, cell) = (&row[0], &row[1], &row[2 + column]);
        let Ok(wanted) = cell.parse::<usize>() else { continue };
        let spaces = ["apiv::", "v_2_0::", "v_1_0::", ""];
        let table = spaces.iter().find_map(|space| headers.table(&format!("{space}{class}")));
        let Some(table) = table else {
            // A class that came later within the family.
            assert!(!is_source(headers), "{class} is not in {}", headers.folder.display());
            continue;
        };
        if method == "(length)" {
            assert!(!is_source(headers) || table.len() == wanted, "{class}: {} entries, not {wanted}", table.len());
            continue;
        }
        let Some(found) = table.get(wanted) else {
            assert!(!is_source(headers), "{class} has no slot {wanted} for {method}");
            continue;
        };
        // Overloads carry their parameter's class behind the name.
        let fits = method == &found.name || method.starts_with(&found.name);
        assert!(fits, "{class} slot {wanted} is {} in {}, not {method}", found.name, headers.folder.display());
        agreed += 1;
    }
    agreed
}

fn enums_agree(headers: &Headers, column: usize) -> usize {
    let mut agreed = 0;
    for row in rows("enums.tsv") {
        let (name, member, cell) = (&row[0], &row[1], &row[2 + column]);
        let members = headers.enums.get(name);
        let found =
            members.and_then(|members| members.iter().find(|(other, _)| other == member)).map(|(_, value)| *value);
        let wanted = cell.parse::<i64>().ok();
        if is_source(headers) || found.is_some() {
            // Within a family members are only ever added.
            let later = wanted.is_none() && !is_source(headers);
            assert!(later || found == wanted, "{name}::{member} is {found:?} in {}", headers.folder.display());
            agreed += 1;
        }
    }
    agreed
}

#[test]
fn tables_equal_headers() {
    let roots = roots();
    let all: Vec<Headers> = roots.iter().flat_map(|root| parser::find(root)).collect();
    let mut checked = 0;
    for headers in &all {
        let label = format!("{}{}.{}", if headers.rtx { "RTX " } else { "" }, headers.major, headers.minor);
        match column(headers) {
            Some(column) => {
                let (slots, values) = (slots_agree(headers, column), enums_agree(headers, column));
                assert!(slots > 300 && values > 80, "{label}: only {slots} slots and {values} values were found");
                eprintln!("headers of TensorRT {label}: {slots} slots and {values} enum values agree");
                checked += 1;
            }
            None => eprintln!("headers of TensorRT {label}: a version that is refused, not compared"),
        }
    }
    if checked == 0 {
        eprintln!(
            "NOT CHECKED against NVIDIA's headers: none found in {roots:?}. Set TRTVLM_TENSORRT_HEADERS, or run \
             `cargo fetch` in a throw-away package that depends on trtx-sys =0.9.1."
        );
    }
}
