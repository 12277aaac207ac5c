//! Mode sizes whose product is a dimension, as in tensor networks: row-major, the first slowest.

/// Two factors as equal as possible, the smaller first; one factor if the dimension is prime.
pub(super) fn near_square(dimension: usize) -> Vec<usize> {
    let smaller = (1..=dimension.isqrt()).rev().find(|factor| dimension.is_multiple_of(*factor)).unwrap_or(1);
    match smaller {
        1 => vec![dimension],
        _ => vec![smaller, dimension / smaller],
    }
}

/// Returns the requested sizes, or near-square ones if there are none; rejects sizes with another product.
pub(super) fn modes(what: &str, asked: &[usize], dimension: usize) -> Result<Vec<usize>, String> {
    match asked.iter().product::<usize>() {
        _ if asked.is_empty() => Ok(near_square(dimension)),
        product if product == dimension => Ok(asked.to_vec()),
        product => Err(format!("{what} {asked:?} have the product {product} instead of {dimension}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_as_equal_as_they_can_be() {
        for (dimension, factors) in [(4096, vec![64, 64]), (11008, vec![86, 128]), (32003, vec![32003]), (1, vec![1])] {
            assert_eq!(near_square(dimension), factors);
        }
        assert_eq!(modes("modes", &[3, 4], 12), Ok(vec![3, 4]));
        assert!(modes("modes", &[3, 4], 13).is_err() && modes("modes", &[0, 4], 12).is_err());
    }
}
