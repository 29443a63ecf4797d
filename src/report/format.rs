//! Numbers and tables for people.
use std::time::Duration;

/// `1.5 GiB`.
pub fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// `0.42 s`, `3 min 05 s`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 60.0 {
        format!("{seconds:.2} s")
    } else {
        format!("{} min {:02} s", duration.as_secs() / 60, duration.as_secs() % 60)
    }
}

/// Columns lined up, two blanks between them; a column of numbers is aligned on the right.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |row: &[String], column: usize| row.get(column).cloned().unwrap_or_default();
    let numeric =
        |text: &str| text.is_empty() || text.starts_with(|first: char| first.is_ascii_digit() || first == '-');
    let columns: Vec<(usize, bool)> = (0..head.len())
        .map(|column| {
            let width = rows.iter().map(|row| cell(row, column).chars().count()).max().unwrap_or(0);
            let right = !rows.is_empty() && rows.iter().all(|row| numeric(&cell(row, column)));
            (width.max(head[column].chars().count()), right)
        })
        .collect();
    let line = |cells: Vec<String>| {
        let aligned = std::iter::zip(&columns, cells)
            .map(|((width, right), cell)| if *right { format!("{cell:>width$}") } else { format!("{cell:<width$}") });
        aligned.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut text = line(head.iter().map(ToString::to_string).collect());
    for row in rows {
        text.push('\n');
        text += &line((0..head.len()).map(|column| cell(row, column)).collect());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_can_read_them() {
        assert_eq!(
            [bytes(999), bytes(1536), bytes(14_130_000_000)],
            ["999 B", "1.5 KiB", "13.2 GiB"].map(String::from)
        );
        assert_eq!(duration(Duration::from_millis(420)), "0.42 s");
        assert_eq!(duration(Duration::from_secs(185)), "3 min 05 s");
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "20".to_owned()]];
        assert_eq!(table(&["name", "n"], &rows), "name   n\na      1\nlong  20");
    }
}
