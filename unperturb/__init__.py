"""Test-time defense of image classifiers: a reverse attack before the classifier, served, trained and measured."""
