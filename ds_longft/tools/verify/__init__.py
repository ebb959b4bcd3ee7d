"""`ds-longft verify`: proof on the user's own model, data, config and machine that what is trained is exact."""
