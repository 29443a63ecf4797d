//! The did-you-mean helper.

/// The candidate closest to `wanted` by edit distance, or `None` where none is close (more than a third of its bytes differ).
pub fn nearest<'a>(wanted: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let mut limit = (wanted.len() / 3).max(1);
    let mut best = None;
    for candidate in candidates {
        let Some(distance) = distance_within(wanted.as_bytes(), candidate.as_bytes(), limit) else { continue };
        best = Some(candidate);
        if distance == 0 {
            break;
        }
        limit = distance - 1;
    }
    best
}

/// Edit distance in bytes, or `None` above `limit`; gives up at the first row that is wholly above it.
fn distance_within(left: &[u8], right: &[u8], limit: usize) -> Option<usize> {
    if left.len().abs_diff(right.len()) > limit {
        return None;
    }
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (line, l) in left.iter().enumerate() {
        let mut before = line + 1;
        let mut least = before;
        let mut next = Vec::with_capacity(row.len());
        next.push(before);
        for (pair, r) in row.windows(2).zip(right) {
            let &[diagonal, above] = pair else { continue };
            before = (diagonal + usize::from(l != r)).min(above + 1).min(before + 1);
            least = least.min(before);
            next.push(before);
        }
        if least > limit {
            return None;
        }
        row = next;
    }
    row.last().copied().filter(|distance| *distance <= limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive(left: &[u8], right: &[u8]) -> usize {
        match (left, right) {
            ([], rest) | (rest, []) => rest.len(),
            ([l, left_rest @ ..], [r, right_rest @ ..]) => (naive(left_rest, right_rest) + usize::from(l != r))
                .min(naive(left_rest, right) + 1)
                .min(naive(left, right_rest) + 1),
        }
    }

    #[test]
    fn a_slip_is_found_and_a_stranger_is_not() {
        let names = ["model.layers.0.q_proj.weight", "model.layers.0.k_proj.weight", "lm_head.weight"];
        assert_eq!(nearest("model.layers.0.kproj.weight", names), Some(names[1]));
        assert_eq!(nearest("vision_tower.patch_embedding", names), None);
        assert_eq!(nearest("", names), None);
    }

    proptest! {
        #[test]
        fn distance_agrees_with_recursion(left in "[abc]{0,5}", right in "[abc]{0,5}", limit in 0usize..7) {
            let wanted = naive(left.as_bytes(), right.as_bytes());
            prop_assert_eq!(distance_within(left.as_bytes(), right.as_bytes(), limit), (wanted <= limit).then_some(wanted));
        }
    }
}
