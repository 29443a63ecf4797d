//! The generated tables are those of the TSV files beside them.
use crate::{Family, enums, slots};

const FAMILIES: [Family; 3] = [Family::Ten, Family::Eleven, Family::Rtx];

#[test]
fn slots_are_those_of_the_list() {
    let text = include_str!("../slots/methods.tsv");
    let rows: Vec<Vec<&str>> = text.lines().skip(1).map(|line| line.split('\t').collect()).collect();
    assert_eq!(rows.len(), slots::ALL.len());
    for (row, method) in std::iter::zip(&rows, slots::ALL) {
        assert_eq!(method.name, format!("{}::{}", row[0], row[1]));
        for (family, cell) in std::iter::zip(FAMILIES, &row[2..]) {
            assert_eq!(method.slot(family), cell.parse().ok(), "{} {family:?}", method.name);
        }
    }
}

#[test]
fn no_slot_lies_past_its_table_and_none_is_used_twice() {
    for family in FAMILIES {
        let mut seen = std::collections::HashSet::new();
        let mut length = None;
        for method in slots::ALL {
            let class = method.name.split("::").next().unwrap();
            if method.name.ends_with("(length)") {
                length = method.slot(family);
            } else if let Some(slot) = method.slot(family) {
                assert!(Some(slot) < length, "{} {family:?}", method.name);
                assert!(seen.insert((class, slot)), "{} {family:?}", method.name);
            }
        }
    }
}

#[test]
fn enum_values_are_those_of_the_list() {
    let text = include_str!("../slots/enums.tsv");
    let rows: Vec<Vec<&str>> = text.lines().skip(1).map(|line| line.split('\t').collect()).collect();
    assert_eq!(rows.len(), enums::ALL.len());
    for (row, (name, member, value)) in std::iter::zip(&rows, enums::ALL) {
        assert_eq!((row[0], row[1]), (*name, *member));
        for (family, cell) in std::iter::zip(FAMILIES, &row[2..]) {
            assert_eq!(value(family), cell.parse().ok(), "{name} {member} {family:?}");
        }
    }
}
