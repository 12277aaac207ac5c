//! The known name that was probably meant.

/// The known name with the fewest edits, when that is few enough to be a slip.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| (distance(name, candidate), candidate))
        .min()
        .filter(|(edits, candidate)| is_slip(*edits, candidate))
        .map(|(_, candidate)| candidate)
}

/// Number of edits between two names.
pub fn distance(name: &str, candidate: &str) -> usize {
    strsim::damerau_levenshtein(name, candidate)
}

/// Whether so few edits are a slip.
pub fn is_slip(edits: usize, candidate: &str) -> bool {
    edits <= 1 + candidate.len() / 3
}
