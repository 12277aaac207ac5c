//! The known name that was probably meant.

/// The known name with the fewest edits, if they are few enough for a typing error.
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

/// Returns true if this number of edits suggests a typing error.
pub fn is_slip(edits: usize, candidate: &str) -> bool {
    edits <= 1 + candidate.len() / 3
}
