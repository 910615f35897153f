"""Tasks on which the global model is evaluated: multiple choice by log-likelihood, and generations."""
