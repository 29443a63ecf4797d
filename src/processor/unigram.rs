//! What SentencePiece's unigram models have and its byte pairs do not: scores of pieces, and a table that text is
//! normalized by. Both are left to the `tokenizers` crate, which trusts them; so they are checked here.
use serde_json::{Value, json};

/// The table's field as a normalizer's JSON: a double array (Aoe 1989, as `darts-clone` packs it), then replacements, each
/// ended by a zero.
///
/// # Errors
/// A table that leads out of itself.
pub(super) fn normalizer(table: &[u8]) -> Result<Value, String> {
    check(table).ok_or("found a table of replacements that leads out of itself")?;
    Ok(json!({"type": "Precompiled", "precompiled_charsmap": base64(table)}))
}

/// Follows every path that a text could.
fn check(table: &[u8]) -> Option<()> {
    let (size, rest) = table.split_first_chunk::<4>()?;
    let (units, replacements) = rest.split_at_checked(u32::from_le_bytes(*size) as usize)?;
    let replacements = std::str::from_utf8(replacements).ok()?;
    let (units, []) = units.as_chunks::<4>() else { return None };
    let units: Vec<u32> = units.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
    let offset = |unit: u32| ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize;
    let mut seen = vec![false; units.len()];
    let mut open = vec![offset(*units.first()?)];
    while let Some(node) = open.pop() {
        // Every byte is tried, so its unit must be there, whatever it says.
        if (node | 0xff) >= units.len() {
            return None;
        }
        if std::mem::replace(&mut seen[node], true) {
            continue;
        }
        for byte in 1..=0xff_usize {
            let at = node ^ byte;
            let unit = units[at];
            if (unit & (1 << 31 | 0xff)) as usize != byte {
                continue;
            }
            let next = at ^ offset(unit);
            if unit >> 8 & 1 == 1 {
                let start = units.get(next)? & !(1 << 31);
                replacements.get(start as usize..)?;
            }
            open.push(next);
        }
    }
    Some(())
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |at: usize| u32::from(chunk.get(at).copied().unwrap_or(0));
        let group = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let value = group >> (18 - 6 * digit) & 0x3f;
            text.push(if digit <= chunk.len() { char::from(DIGITS[value as usize]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    /// Units of a table whose root leads to node 0, with these changed.
    fn table(changes: &[(usize, u32)], replacements: &[u8]) -> Vec<u8> {
        let mut units = vec![0_u32; 256];
        changes.iter().for_each(|&(at, unit)| units[at] = unit);
        let bytes: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        [&(bytes.len() as u32).to_le_bytes(), &bytes[..], replacements].concat()
    }

    #[test]
    fn tables_that_lead_out_of_themselves_are_refused() {
        let a = u32::from(b'a');
        // `a` leads to unit 0 ^ 97 ^ 3 and has a value there.
        let leaf = (a as usize, a | 1 << 8 | 3 << 10);
        let place = a as usize ^ 3;
        assert!(check(&table(&[leaf, (place, 2)], b"ab\0")).is_some());
        assert!(check(&table(&[leaf, (place, 3)], b"ab\0")).is_some());
        assert!(check(&table(&[leaf, (place, 4)], b"ab\0")).is_none(), "behind the replacements");
        assert!(check(&table(&[leaf, (place, 1)], "ö\0".as_bytes())).is_none(), "in the middle of a letter");
        assert!(check(&table(&[leaf], &[0xff])).is_none(), "no UTF-8");
        assert!(check(&table(&[(a as usize, a | 1 << 20)], b"\0")).is_none(), "a unit that is not there");
        assert!(check(&table(&[(0, 1 << 20)], b"\0")).is_none(), "no such first unit");
        assert!(check(&table(&[], b"")[..40]).is_none(), "cut off");
        assert!(check(&[]).is_none() && check(&[0, 0, 0, 0]).is_none(), "nothing");
        // Round in a circle.
        assert!(check(&table(&[(a as usize, a | a << 10)], b"\0")).is_some());
    }
}
